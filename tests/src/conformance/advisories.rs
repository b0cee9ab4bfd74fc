//! A case for each security advisory of Xen whose bug is visible through the protocol. XSA-72, 115,
//! 324 and 420 also have unit tests in `protocol` and `store`.

use super::{Case, case, guest};
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    guest("xsa-115/guests-watching-the-root-see-nothing-foreign", |c| {
        let (mut guest, mut other) = (c.guest()?, c.guest()?);
        guest.conn.watch("/|t|")?;
        other.conn.ok(op::WRITE, "secret|1")?;
        c.dom0.ok(op::WRITE, &format!("{}|1", c.base.clone() + "/x"))?;
        guest.conn.events(&[])?;
        guest.conn.fails(op::IS_DOMAIN_INTRODUCED, "0|", "EACCES")
    }),
    guest("xsa-206/a-guest-writing-beside-does-not-stop-a-transaction", |c| {
        let mut guest = c.guest()?;
        let path = c.at("a");
        for i in 0..50 {
            let tx = c.dom0.begin()?;
            c.dom0.gives_in(tx, op::WRITE, &format!("{path}|{i}"), "OK|")?;
            // The transaction overwrites one value without reading it, and reads another.
            c.dom0.tx(tx, op::READ, &format!("{}/other|", guest.home))?.ok();
            guest.conn.ok(op::WRITE, &format!("busy|{i}"))?;
            c.dom0.gives_in(tx, op::WRITE, &format!("{}/busy|{i}", guest.home), "OK|")?;
            c.dom0.end(tx, "T|", "OK|")?;
        }
        Ok(())
    }),
    guest("xsa-233/model-and-target-die-in-any-order", |c| {
        for target_first in [true, false] {
            let (model, target) = (c.guest()?.domid, c.guest()?.domid);
            c.dom0.gives(op::SET_TARGET, &format!("{model}|{target}|"), "OK|")?;
            let order = if target_first { [target, model] } else { [model, target] };
            for domid in order {
                c.destroy(domid)?;
            }
        }
        Ok(())
    }),
    guest("xsa-272/every-way-of-creating-counts", |c| {
        let mut guest = c.guest()?;
        c.dom0.gives(op::SET_QUOTA, &format!("{}|nodes|1|", guest.domid), "OK|")?;
        guest.conn.fails(op::WRITE, "a|", "ENOSPC")?;
        guest.conn.fails(op::MKDIR, "a|", "ENOSPC")?;
        guest.conn.fails(op::WRITE, "a/b|", "ENOSPC")?;
        let tx = guest.conn.begin()?;
        guest.conn.fails_in(tx, op::MKDIR, "a|", "ENOSPC")?;
        guest.conn.end(tx, "F|", "OK|")
    }),
    guest("xsa-322/a-new-domain-inherits-nothing", |c| {
        let guest = c.guest()?;
        let path = c.node("a", "secret", &format!("n0|r{}|", guest.domid))?;
        c.destroy(guest.domid)?;
        let mut again = c.guest_as(guest.domid)?;
        again.conn.fails(op::READ, &format!("{path}|"), "EACCES")
    }),
    guest("xsa-323/the-limit-is-on-the-part-below-the-home", |c| {
        let mut guest = c.guest()?;
        let name = "n".repeat(1000);
        guest.conn.gives(op::WRITE, &format!("{name}|v"), "OK|")?;
        c.dom0.gives(op::READ, &format!("{}/{name}|", guest.home), "v")
    }),
    case("xsa-324/tokens-near-4096-bytes", |c| {
        for len in 4060..4080 {
            let path = c.at("a");
            let token = "t".repeat(len - path.len());
            c.dom0.gives(op::WATCH, &format!("{path}|{token}|"), "OK|")?;
            c.dom0.event(&format!("{path}|{token}|"))?;
            c.dom0.ok(op::WRITE, &format!("{path}/some/way/below|v"))?;
            c.dom0.gives(op::UNWATCH, &format!("{path}|{token}|"), "OK|")?;
            c.dom0.events.clear(); // another case checks the events
        }
        Ok(())
    }),
    guest("xsa-326/an-unread-reply-does-not-stop-others", |c| {
        let mut guest = c.guest()?;
        guest.conn.ok(op::WRITE, &format!("big|{}", "v".repeat(900)))?;
        for _ in 0..10 {
            guest.conn.start(op::READ, 0, b"big\0")?; // and does not read the reply
        }
        c.dom0.gives(op::READ, &format!("{}/big|", guest.home), &"v".repeat(900))
    }),
    guest("xsa-325/a-protocol-error-is-not-a-death", |c| {
        let mut guest = c.guest()?;
        c.dom0.watch("@releaseDomain|t|")?;
        let header = [op::READ, 1, 0, 5000].map(u32::to_le_bytes).concat();
        guest.conn.send(&header)?;
        // The guest is not served any more, but exists.
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{}|", guest.domid), "T|")?;
        c.dom0.events(&[])?;
        c.destroy(guest.domid)?;
        c.dom0.event("@releaseDomain|t|")
    }),
    case("xsa-330/watches-that-come-and-go-leave-nothing", |c| {
        for i in 0..200 {
            let path = c.at(&format!("w{}", i % 7));
            c.dom0.gives(op::WATCH, &format!("{path}|t|"), "OK|")?;
            c.dom0.event(&format!("{path}|t|"))?;
            c.dom0.gives(op::RESET_WATCHES, "|", "OK|")?;
        }
        c.dom0.ok(op::WRITE, &format!("{}/w1|", c.base))?;
        c.dom0.events(&[])
    }),
    case("xsa-349/equal-events-that-wait-are-one", |c| {
        let mut sleeper = c.another()?;
        let path = c.at("a");
        sleeper.watch(&format!("{path}|t|"))?;
        // More bytes than a socket buffer.
        for i in 0..20_000 {
            c.dom0.ok(op::WRITE, &format!("{path}|{i}"))?;
        }
        let mut count = 0;
        sleeper.ask(op::GET_DOMAIN_PATH, 0, b"0\0")?.map_err(|e| e.to_string())?;
        count += sleeper.events.len();
        match count {
            1..20_000 => Ok(()),
            _ => Err(format!("{count} events of 20,000 changes")),
        }
    }),
    guest("xsa-352/owners-cannot-give-nodes-away", |c| {
        let (mut guest, other) = (c.guest()?, c.guest()?);
        guest.conn.ok(op::WRITE, "a|")?;
        guest.conn.fails(op::SET_PERMS, &format!("a|n{}|", other.domid), "EPERM")?;
        guest.conn.gives(op::GET_PERMS, "a|", &format!("n{}|", guest.domid))
    }),
    guest("xsa-353/the-root-is-checked-like-any-node", |c| {
        let mut guest = c.guest()?;
        guest.conn.fails(op::SET_PERMS, &format!("/|b{}|", guest.domid), "EACCES")?;
        guest.conn.fails(op::WRITE, "/|x", "EACCES")?;
        guest.conn.fails(op::MKDIR, "/x|", "EACCES")?;
        guest.conn.fails(op::RM, "/|", "EACCES")?;
        guest.conn.fails(op::DIRECTORY, "/|", "EACCES")
    }),
    guest("xsa-415/a-failed-create-in-a-transaction-leaves-nothing", |c| {
        let mut guest = c.guest()?;
        c.dom0.gives(op::SET_QUOTA, &format!("{}|nodes|3|", guest.domid), "OK|")?;
        let tx = guest.conn.begin()?;
        guest.conn.fails_in(tx, op::WRITE, "a/b/c|", "ENOSPC")?;
        guest.conn.gives_in(tx, op::WRITE, "x|", "OK|")?;
        guest.conn.end(tx, "T|", "OK|")?;
        guest.conn.gives(op::DIRECTORY, &format!("{}|", guest.home), "x|")?;
        c.dom0.gives(op::CONTROL, "check|", "OK|")
    }),
    guest("xsa-417/entries-for-the-dead-stay-dead", |c| {
        let domid = c.guest()?.domid;
        c.destroy(domid)?;
        // In memory, every domain exists until it is destroyed: destroy it again after the entry.
        let path = c.node("a", "secret", &format!("n0|r{domid}|"))?;
        let mut again = c.guest_as(domid)?;
        if again.conn.tx(0, op::READ, &format!("{path}|"))?.is_ok() && c.knows_who_exists() {
            return Err("an entry that was set for the dead counts for the living".into());
        }
        c.destroy(domid)?;
        let mut third = c.guest_as(domid)?;
        third.conn.fails(op::READ, &format!("{path}|"), "EACCES")
    }),
    case("xsa-418/deep-trees", |c| {
        let path = c.base.clone() + &"/d".repeat(1500);
        c.dom0.gives(op::WRITE, &format!("{path}|v"), "OK|")?;
        c.dom0.gives(op::CONTROL, "check|", "OK|")?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{path}|w"), "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.gives(op::RM, &format!("{}/d|", c.base), "OK|")
    }),
    guest("xsa-419/nodes-of-the-dead-are-removed", |c| {
        let (mut a, b) = (c.guest()?, c.guest()?);
        a.conn.ok(op::WRITE, "shared|")?;
        a.conn.gives(op::SET_PERMS, &format!("shared|n{}|b{}|", a.domid, b.domid), "OK|")?;
        let (mut b_conn, home) = (b.conn, a.home.clone());
        b_conn.ok(op::WRITE, &format!("{home}/shared/of-b|"))?;
        c.destroy(a.domid)?;
        c.dom0.fails(op::READ, &format!("{home}/shared/of-b|"), "ENOENT")
    }),
    guest("xsa-421/create-and-remove-in-one-transaction", |c| {
        let mut guest = c.guest()?;
        for _ in 0..3 {
            let tx = guest.conn.begin()?;
            guest.conn.gives_in(tx, op::WRITE, "a/b|", "OK|")?;
            guest.conn.gives_in(tx, op::RM, "a|", "OK|")?;
            guest.conn.gives_in(tx, op::WRITE, "a/c|", "OK|")?;
            guest.conn.end(tx, "T|", "OK|")?;
        }
        guest.conn.gives(op::DIRECTORY, "a|", "c|")?;
        c.dom0.gives(op::CONTROL, "check|", "OK|")
    }),
    guest("xsa-425/release-beside-other-guests", |c| {
        let (a, mut b, z) = (c.guest()?, c.guest()?, c.guest()?);
        for domid in [a.domid, z.domid] {
            c.dom0.gives(op::RELEASE, &format!("{domid}|"), "OK|")?;
        }
        b.conn.gives(op::MKDIR, "alive|", "OK|")
    }),
    guest("xsa-440/two-transactions-remove-the-same-nodes", |c| {
        let mut guest = c.guest()?;
        for i in 0..50 {
            guest.conn.ok(op::WRITE, &format!("d/{i}|"))?;
        }
        let (a, b) = (guest.conn.begin()?, guest.conn.begin()?);
        for tx in [a, b] {
            for i in 0..50 {
                guest.conn.gives_in(tx, op::RM, &format!("d/{i}|"), "OK|")?;
            }
        }
        guest.conn.end(a, "T|", "OK|")?;
        guest.conn.end(b, "T|", "OK|")?;
        c.dom0.gives(op::CONTROL, "check|", "OK|")
    }),
    case("xsa-481/every-variant-of-a-domain-path-is-answered", |c| {
        for path in ["/local/domain/", "/local/domain//", "/local/domain/x/", "/local/domain/5//"] {
            c.dom0.fails(op::READ, &format!("{path}|"), "EINVAL")?;
        }
        for path in ["/local/domain/x/y", "/local/domain/65536/y", "/local/domain/4993"] {
            c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")?;
        }
        Ok(())
    }),
    guest("xsa-483/a-new-domain-starts-with-its-whole-quota", |c| {
        let mut guest = c.guest()?;
        for i in 0..700 {
            guest.conn.ok(op::WRITE, &format!("d{}/{i}|", i % 7))?;
        }
        c.destroy(guest.domid)?;
        let mut again = c.guest_as(guest.domid)?;
        for i in 0..700 {
            again.conn.ok(op::WRITE, &format!("d{}/{i}|", i % 7))?;
        }
        Ok(())
    }),
    guest("xsa-484/reset-watches-in-a-transaction", |c| {
        let mut guest = c.guest()?;
        let tx = guest.conn.begin()?;
        guest.conn.gives_in(tx, op::WRITE, "a|", "OK|")?;
        guest.conn.gives_in(tx, op::RESET_WATCHES, "|", "OK|")?;
        guest.conn.end(tx, "T|", "ENOENT")?;
        guest.conn.fails(op::READ, "a|", "ENOENT")
    }),
];
