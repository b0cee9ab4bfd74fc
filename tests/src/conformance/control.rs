//! CONTROL.

use super::{Case, case, guest};
use crate::raw::op;

/// The quotas with a row of output, in the order of C xenstored.
const LIMITED: [&str; 9] = [
    "nodes",
    "watches",
    "outstanding",
    "memory",
    "transactions",
    "transaction-nodes",
    "node-permissions",
    "path-max",
    "node-size",
];

pub(super) const CASES: &[Case] = &[
    case("control/check", |c| c.dom0.gives(op::CONTROL, "check|", "OK|")),
    case("control/check-takes-no-argument", |c| c.dom0.fails(op::CONTROL, "check|x|", "EINVAL")),
    case("control/print", |c| c.dom0.gives(op::CONTROL, "print|conformance|", "OK|")),
    case("control/unknown-is-einval", |c| c.dom0.fails(op::CONTROL, "bogus|", "EINVAL")),
    case("control/malformed-is-einval", |c| {
        c.dom0.fails(op::CONTROL, "", "EINVAL")?;
        c.dom0.fails(op::CONTROL, "check", "EINVAL")
    }),
    guest("control/guests-may-not", |c| c.guest()?.conn.fails(op::CONTROL, "check|", "EACCES")),
    case("control/log-settings", |c| {
        let text = c.dom0.ok(op::CONTROL, "log|")?;
        let switches = ["obj", "io", "wrl", "acc", "tdb"];
        let as_expected = text.starts_with("Log switch settings:\n")
            && switches.iter().all(|s| text.contains(&format!("\n{s:<8}: o")));
        if as_expected { Ok(()) } else { Err(text) }
    }),
    case("control/log-switches", |c| {
        c.dom0.gives(op::CONTROL, "log|+io|", "OK|")?;
        c.dom0.fails(op::CONTROL, "log|+bogus|", "EINVAL")
    }),
    case("control/quota-settings", |c| {
        let text = c.dom0.ok(op::CONTROL, "quota|")?;
        if text.starts_with("Quota settings:\n") && text.contains("\nnodes            :     1000 ")
        {
            Ok(())
        } else {
            Err(text)
        }
    }),
    case("control/quota-set", |c| {
        c.dom0.gives(op::CONTROL, "quota|set|nodes|1001|", "OK|")?;
        c.dom0.gives(op::CONTROL, "quota|set|nodes|1000|", "OK|")?;
        c.dom0.fails(op::CONTROL, "quota|set|bogus|1|", "EINVAL")
    }),
    case("control/quota-set-to-no-limit", |c| {
        c.dom0.gives(op::CONTROL, "quota|set|nodes|0|", "OK|")?;
        c.dom0.gives(op::CONTROL, "quota|set|nodes|1000|", "OK|")
    }),
    guest("control/quota-of-a-domain", |c| {
        let guest = c.guest()?;
        let domid = guest.domid;
        let text = c.dom0.ok(op::CONTROL, &format!("quota|{domid}|"))?;
        let as_expected = text.starts_with(&format!("Domain {domid}:\n"))
            && text.contains("\nnodes            :        1 (max ");
        if !as_expected {
            return Err(text);
        }
        c.dom0.fails(op::CONTROL, "quota|4994|", "ENOENT")
    }),
    guest("control/quota-of-a-domain-has-nine-rows", |c| {
        let mut guest = c.guest()?;
        guest.conn.ok(op::WRITE, "long|0123456789")?;
        for (command, title) in
            [(format!("quota|{}|", guest.domid), "Domain"), ("quota|max|".into(), "Max")]
        {
            let text = c.dom0.ok(op::CONTROL, &command)?;
            let mut lines = text.trim_end_matches('|').lines();
            let is_titled = lines.next().is_some_and(|line| line.starts_with(title));
            let names: Vec<&str> =
                lines.map(|line| line.split([' ', ':']).next().unwrap_or("")).collect();
            if !is_titled || names != LIMITED {
                return Err(text);
            }
        }
        Ok(())
    }),
    case("control/quota-max", |c| {
        let text = c.dom0.ok(op::CONTROL, "quota|max|")?;
        if text.starts_with("Max. seen accounting values:\n") { Ok(()) } else { Err(text) }
    }),
    case("control/quota-soft", |c| {
        let text = c.dom0.ok(op::CONTROL, "quota-soft|")?;
        if !text.contains("memory") {
            return Err(text);
        }
        c.dom0.gives(op::CONTROL, "quota-soft|set|memory|2097152|", "OK|")?;
        c.dom0.fails(op::CONTROL, "quota-soft|set|nodes|1|", "EINVAL")
    }),
    case("control/help", |c| {
        let text = c.dom0.ok(op::CONTROL, "help|")?;
        let commands = ["check", "log", "print", "quota", "quota-soft", "help"];
        if commands.iter().all(|name| text.contains(name)) { Ok(()) } else { Err(text) }
    }),
    case("control/in-a-transaction", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::CONTROL, "check|", "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.fails_in(99, op::CONTROL, "check|", "ENOENT")
    }),
];
