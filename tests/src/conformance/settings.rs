//! GET_FEATURE, SET_FEATURE, GET_QUOTA, SET_QUOTA.

use super::{Case, case, guest};
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    case("feature/own-are-all-four", |c| c.dom0.gives(op::GET_FEATURE, "", "15|")),
    guest("feature/guests-may-ask-for-their-own-alone", |c| {
        let mut guest = c.guest()?;
        guest.conn.gives(op::GET_FEATURE, "", "15|")?;
        guest.conn.fails(op::GET_FEATURE, "0|", "EACCES")
    }),
    guest("feature/can-be-set-before-introduction", |c| {
        let (domid, _device) = c.create()?;
        c.dom0.gives(op::SET_FEATURE, &format!("{domid}|3|"), "OK|")?;
        c.dom0.gives(op::GET_FEATURE, &format!("{domid}|"), "3|")?;
        let mut guest = c.guest_as(domid)?;
        guest.conn.gives(op::GET_FEATURE, "", "3|")?;
        guest.conn.fails(op::WATCH, "x|t|1|", "EINVAL")
    }),
    guest("feature/cannot-be-set-afterwards", |c| {
        let domid = c.guest()?.domid;
        c.dom0.fails(op::SET_FEATURE, &format!("{domid}|3|"), "EBUSY")
    }),
    guest("feature/unknown-bits-are-einval", |c| {
        let (domid, _device) = c.create()?;
        c.dom0.fails(op::SET_FEATURE, &format!("{domid}|16|"), "EINVAL")
    }),
    case("feature/malformed-is-einval", |c| {
        for payload in ["|", "x|", "5|6|"] {
            c.dom0.fails(op::GET_FEATURE, payload, "EINVAL")?;
        }
        for payload in ["", "5|", "5|x|", "5|1|2|"] {
            c.dom0.fails(op::SET_FEATURE, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("quota/names", |c| {
        let names = c.dom0.ok(op::GET_QUOTA, "")?;
        let expected = "nodes watches outstanding memory soft-memory transactions \
                        transaction-nodes node-permissions path-max node-size|";
        if names == expected { Ok(()) } else { Err(names) }
    }),
    case("quota/defaults", |c| {
        for (name, value) in [
            ("nodes", "1000|"),
            ("watches", "128|"),
            ("outstanding", "20|"),
            ("memory", "2621440|"),
            ("soft-memory", "2097152|"),
            ("transactions", "10|"),
            ("transaction-nodes", "1024|"),
            ("node-permissions", "5|"),
            ("path-max", "2048|"),
            ("node-size", "2048|"),
        ] {
            c.dom0.gives(op::GET_QUOTA, &format!("{name}|"), value)?;
        }
        Ok(())
    }),
    case("quota/of-dom0-are-what-domains-start-with", |c| {
        c.dom0.gives(op::GET_QUOTA, "0|nodes|", "1000|")?;
        c.dom0.gives(op::GET_QUOTA, "0|node-size|", "2048|")
    }),
    case("quota/global-can-be-set", |c| {
        let before = c.dom0.ok(op::GET_QUOTA, "nodes|")?;
        c.dom0.gives(op::SET_QUOTA, "nodes|77|", "OK|")?;
        c.dom0.gives(op::GET_QUOTA, "nodes|", "77|")?;
        c.dom0.gives(op::SET_QUOTA, &format!("nodes|{before}"), "OK|")
    }),
    guest("quota/of-a-domain-can-be-set", |c| {
        let domid = c.guest()?.domid;
        c.dom0.gives(op::SET_QUOTA, &format!("{domid}|nodes|7|"), "OK|")?;
        c.dom0.gives(op::GET_QUOTA, &format!("{domid}|nodes|"), "7|")?;
        c.dom0.gives(op::GET_QUOTA, "nodes|", "1000|")
    }),
    guest("quota/of-a-domain-can-be-set-before-introduction", |c| {
        let (domid, _device) = c.create()?;
        c.dom0.gives(op::SET_QUOTA, &format!("{domid}|nodes|7|"), "OK|")?;
        c.guest_as(domid)?;
        c.dom0.gives(op::GET_QUOTA, &format!("{domid}|nodes|"), "7|")
    }),
    case("quota/a-malformed-request-is-not-looked-at", |c| {
        c.dom0.fails(op::SET_QUOTA, "4994|bogus|1|", "EINVAL")
    }),
    guest("feature/a-malformed-request-is-not-looked-at", |c| {
        let mut guest = c.guest()?;
        guest.conn.fails(op::GET_FEATURE, "x|", "EINVAL")?;
        guest.conn.fails(op::GET_FEATURE, "0|", "EACCES")
    }),
    case("quota/malformed-is-einval", |c| {
        for payload in ["bogus|", "|", "0|bogus|", "nodes|nodes|", "0|nodes|1|"] {
            c.dom0.fails(op::GET_QUOTA, payload, "EINVAL")?;
        }
        for payload in ["", "nodes|", "nodes|x|", "bogus|1|", "nodes|4294967295|", "0|nodes|1|2|"] {
            c.dom0.fails(op::SET_QUOTA, payload, "EINVAL")?;
        }
        Ok(())
    }),
];
