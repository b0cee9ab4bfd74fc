//! Quotas: N is allowed, N + 1 is not, and other domains are not affected.

use super::{Case, Ctx, Guest, case, guest};
use crate::raw::op;

/// A guest with one lowered quota.
fn limited(c: &mut Ctx<'_>, quota: &str, limit: u32) -> Result<Guest, String> {
    let guest = c.guest()?;
    c.dom0.gives(op::SET_QUOTA, &format!("{}|{quota}|{limit}|", guest.domid), "OK|")?;
    Ok(guest)
}

pub(super) const CASES: &[Case] = &[
    guest("quota/nodes", |c| {
        let mut guest = limited(c, "nodes", 4)?; // its home is the first node
        for name in ["a", "b", "c"] {
            guest.conn.gives(op::WRITE, &format!("{name}|"), "OK|")?;
        }
        guest.conn.fails(op::WRITE, "d|", "ENOSPC")?;
        guest.conn.fails(op::MKDIR, "d|", "ENOSPC")?;
        guest.conn.gives(op::WRITE, "a|still", "OK|")?;
        guest.conn.gives(op::RM, "a|", "OK|")?;
        guest.conn.gives(op::MKDIR, "d|", "OK|")
    }),
    guest("quota/nodes-counts-created-parents-and-fails-whole", |c| {
        let mut guest = limited(c, "nodes", 3)?;
        guest.conn.fails(op::WRITE, "a/b/c|", "ENOSPC")?;
        guest.conn.fails(op::READ, "a|", "ENOENT")?;
        guest.conn.gives(op::WRITE, "a/b|", "OK|")
    }),
    guest("quota/nodes-in-a-transaction", |c| {
        let mut guest = limited(c, "nodes", 2)?;
        let tx = guest.conn.begin()?;
        guest.conn.gives_in(tx, op::WRITE, "a|", "OK|")?;
        guest.conn.fails_in(tx, op::WRITE, "b|", "ENOSPC")?;
        guest.conn.end(tx, "F|", "OK|")?;
        guest.conn.gives(op::WRITE, "a|", "OK|")
    }),
    guest("quota/nodes-at-commit", |c| {
        let mut guest = limited(c, "nodes", 2)?;
        let (a, b) = (guest.conn.begin()?, guest.conn.begin()?);
        guest.conn.gives_in(a, op::WRITE, "a|", "OK|")?;
        guest.conn.gives_in(b, op::WRITE, "b|", "OK|")?;
        guest.conn.end(a, "T|", "OK|")?;
        guest.conn.end(b, "T|", "ENOSPC")
    }),
    guest("quota/nodes-given-by-dom0-count-but-are-not-refused", |c| {
        let mut guest = limited(c, "nodes", 2)?;
        for name in ["x", "y", "z"] {
            c.node(name, "", &format!("n{}|", guest.domid))?;
        }
        guest.conn.fails(op::WRITE, "a|", "ENOSPC")
    }),
    guest("quota/default-of-1000-nodes", |c| {
        let mut guest = c.guest()?;
        for i in 0..999 {
            guest.conn.gives(op::MKDIR, &format!("d{}/{i}|", i % 2), "OK|").or_else(|error| {
                // Both parents count.
                if i >= 997 { Ok(()) } else { Err(error) }
            })?;
        }
        guest.conn.fails(op::MKDIR, "d0/more|", "ENOSPC")?;
        c.guest()?.conn.gives(op::MKDIR, "a|", "OK|")
    }),
    guest("quota/watches", |c| {
        let mut guest = limited(c, "watches", 2)?;
        guest.conn.watch("a|t|")?;
        guest.conn.watch("b|t|")?;
        guest.conn.fails(op::WATCH, "c|t|", "ENOSPC")?;
        guest.conn.fails(op::WATCH, "a|t|", "EEXIST")?;
        guest.conn.gives(op::UNWATCH, "a|t|", "OK|")?;
        guest.conn.watch("c|t|")
    }),
    guest("quota/default-of-128-watches", |c| {
        let mut guest = c.guest()?;
        for i in 0..128 {
            guest.conn.watch(&format!("{i}|t|"))?;
        }
        guest.conn.fails(op::WATCH, "more|t|", "ENOSPC")
    }),
    guest("quota/transactions", |c| {
        let mut guest = limited(c, "transactions", 2)?;
        let first = guest.conn.begin()?;
        guest.conn.begin()?;
        guest.conn.fails(op::TRANSACTION_START, "|", "ENOSPC")?;
        guest.conn.end(first, "F|", "OK|")?;
        guest.conn.begin().map(drop)
    }),
    guest("quota/default-of-10-transactions", |c| {
        let mut guest = c.guest()?;
        for _ in 0..10 {
            guest.conn.begin()?;
        }
        guest.conn.fails(op::TRANSACTION_START, "|", "ENOSPC")
    }),
    guest("quota/transaction-nodes", |c| {
        let mut guest = limited(c, "transaction-nodes", 2)?;
        for (how, expected) in [("T|", "ENOSPC"), ("F|", "OK|")] {
            let tx = guest.conn.begin()?;
            guest.conn.gives_in(tx, op::WRITE, "a|", "OK|")?;
            guest.conn.gives_in(tx, op::WRITE, "b|", "OK|")?;
            guest.conn.fails_in(tx, op::WRITE, "c|", "ENOSPC")?;
            guest.conn.end(tx, how, expected)?;
            guest.conn.end(tx, how, "ENOENT")?;
        }
        guest.conn.fails(op::READ, "a|", "ENOENT")
    }),
    guest("quota/node-permissions", |c| {
        let mut guest = c.guest()?;
        guest.conn.ok(op::WRITE, "a|")?;
        let entries = |count: usize| format!("a|n{}|{}", guest.domid, "r0|".repeat(count - 1));
        let (five, six) = (entries(5), entries(6));
        guest.conn.gives(op::SET_PERMS, &five, "OK|")?;
        guest.conn.fails(op::SET_PERMS, &six, "ENOSPC")
    }),
    guest("quota/node-size", |c| {
        let mut guest = c.guest()?;
        // 16 bytes, 8 for the permission entry, and the value.
        let value = |len: usize| format!("a|{}", "v".repeat(len));
        guest.conn.fails(op::WRITE, &value(2048 - 24 + 1), "ENOSPC")?;
        guest.conn.gives(op::WRITE, &value(2048 - 24), "OK|")?;
        guest.conn.fails(op::WRITE, &value(2048 - 24 + 1), "ENOSPC")?;
        guest.conn.fails(op::WRITE, "a/b|", "ENOSPC")
    }),
    guest("quota/path-max", |c| {
        let mut guest = limited(c, "path-max", 10)?;
        guest.conn.gives(op::WRITE, "0123456789|", "OK|")?;
        guest.conn.fails(op::WRITE, "01234567890|", "EINVAL")?;
        let home = guest.home.clone();
        guest.conn.gives(op::READ, &format!("{home}/0123456789|"), "")?;
        guest.conn.fails(op::WATCH, "01234567890|t|", "EINVAL")
    }),
    guest("quota/memory", |c| {
        let mut guest = limited(c, "memory", 10_000)?;
        let mut written = 0;
        while guest.conn.tx(0, op::WRITE, &format!("n{written}|{}", "v".repeat(1000)))?.is_ok() {
            written += 1;
            if written > 10 {
                return Err("more than 10,000 bytes".into());
            }
        }
        guest.conn.fails(op::WRITE, &format!("more|{}", "v".repeat(1000)), "ENOSPC")?;
        guest.conn.gives(op::RM, "n0|", "OK|")?;
        guest.conn.gives(op::WRITE, &format!("n0|{}", "v".repeat(1000)), "OK|")
    }),
    guest("quota/0-is-no-limit", |c| {
        let mut guest = limited(c, "watches", 0)?;
        for i in 0..200 {
            guest.conn.watch(&format!("{i}|t|"))?;
        }
        Ok(())
    }),
    case("quota/not-for-dom0", |c| {
        for i in 0..1100 {
            c.dom0.gives(op::MKDIR, &format!("{}|", c.base.clone() + &format!("/{i}")), "OK|")?;
        }
        for i in 0..200 {
            c.dom0.watch(&format!("{}/{i}|t|", c.base))?;
        }
        for _ in 0..12 {
            c.dom0.begin()?;
        }
        let value = "v".repeat(3000);
        c.dom0.gives(op::WRITE, &format!("{}/big|{value}", c.base), "OK|")
    }),
    guest("quota/lowering-it-keeps-what-is-there", |c| {
        let mut guest = c.guest()?;
        for name in ["a", "b", "c"] {
            guest.conn.ok(op::WRITE, &format!("{name}|"))?;
        }
        c.dom0.gives(op::SET_QUOTA, &format!("{}|nodes|2|", guest.domid), "OK|")?;
        guest.conn.gives(op::READ, "c|", "")?;
        guest.conn.fails(op::WRITE, "d|", "ENOSPC")
    }),
];
