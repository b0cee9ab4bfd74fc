//! Frames: ids, limits, pieces, unknown types, and the order of checks.

use super::{Case, case, guest};
use crate::raw::{PATIENCE, frame, op};

/// On a ring this is permanent, or until the guest reconnects (`tests/tests/rings`).
const BREAKS: &str = "ends the only connection";

pub(super) const CASES: &[Case] = &[
    case("framing/ids-are-echoed", |c| {
        c.dom0.send(&frame(op::READ, 0xdead_beef, 0, b"/tool\0"))?;
        let reply = c.dom0.reply()?;
        if (reply.ty, reply.req_id, reply.tx_id) != (op::READ, 0xdead_beef, 0) {
            return Err(format!("{reply:?}"));
        }
        Ok(())
    }),
    case("framing/errors-echo-ids-and-end-in-nul", |c| {
        c.dom0.send(&frame(op::READ, 77, 99, b"/tool\0"))?;
        let reply = c.dom0.reply()?;
        match (reply.ty, reply.req_id, reply.tx_id, reply.payload.last()) {
            (op::ERROR, 77, 99, Some(0)) => Ok(()),
            _ => Err(format!("{reply:?}")),
        }
    }),
    case("framing/replies-come-in-order", |c| {
        for id in 1..=20 {
            let payload = if id % 2 == 0 { &b"/tool\0"[..] } else { b"/nope\0" };
            c.dom0.send(&frame(op::READ, id, 0, payload))?;
        }
        for id in 1..=20 {
            let reply = c.dom0.reply()?;
            if reply.req_id != id {
                return Err(format!("reply {} where {id} belongs", reply.req_id));
            }
        }
        Ok(())
    }),
    case("framing/any-cut-is-fine", |c| {
        let bytes =
            [frame(op::READ, 1, 0, b"/tool\0"), frame(op::MKDIR, 2, 0, b"/tool\0")].concat();
        for byte in &bytes {
            c.dom0.send(&[*byte])?;
        }
        let (first, second) = (c.dom0.reply()?, c.dom0.reply()?);
        match ((first.ty, first.req_id), (second.ty, second.req_id)) {
            ((op::READ, 1), (op::MKDIR, 2)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }),
    case("framing/request-of-4096-bytes", |c| {
        let path = c.at("big");
        let value = "x".repeat(4096 - path.len() - 1);
        c.dom0.gives(op::WRITE, &format!("{path}|{value}"), "OK|")?;
        c.dom0.gives(op::READ, &format!("{path}|"), &value)
    }),
    case("framing/request-over-4096-bytes-ends-the-connection", |c| {
        c.dom0.send(&[op::READ, 1, 0, 4097].map(u32::to_le_bytes).concat())?;
        c.dom0.ends()
    })
    .not_on_a_ring(BREAKS),
    case("framing/length-of-2-to-the-31-ends-the-connection", |c| {
        c.dom0.send(&[op::READ, 1, 0, 0x8000_0000].map(u32::to_le_bytes).concat())?;
        c.dom0.ends()
    })
    .not_on_a_ring(BREAKS),
    case("framing/length-of-2-to-the-32-less-1-ends-the-connection", |c| {
        c.dom0.send(&[op::READ, 1, 0, u32::MAX].map(u32::to_le_bytes).concat())?;
        c.dom0.ends()
    })
    .not_on_a_ring(BREAKS),
    case("framing/only-the-offender-is-ended", |c| {
        let mut other = c.another()?;
        c.dom0.send(&[op::READ, 1, 0, 5000].map(u32::to_le_bytes).concat())?;
        c.dom0.ends()?;
        other.gives(op::MKDIR, "/tool|", "OK|")
    })
    .not_on_a_ring(BREAKS),
    case("framing/half-a-frame-and-the-end", |c| {
        let mut other = c.another()?;
        other.send(&frame(op::RM, 1, 0, format!("{}\0", c.base).as_bytes())[..20])?;
        drop(other);
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "")
    }),
    case("framing/zero-length-requests-are-answered-at-once", |c| {
        c.dom0.send(&frame(op::TRANSACTION_START, 5, 0, b""))?;
        let reply = c.dom0.reply()?;
        if reply.req_id != 5 {
            return Err(format!("{reply:?}"));
        }
        Ok(())
    }),
    case("framing/unknown-types-are-enosys", |c| {
        for ty in [20, 27, 28, 1000, 65535, u32::MAX] {
            c.dom0.start(ty, 0, b"/tool\0")?;
            let reply = c.dom0.reply()?;
            if (reply.ty, &reply.payload[..]) != (op::ERROR, b"ENOSYS\0") {
                return Err(format!("type {ty}: {reply:?}"));
            }
        }
        Ok(())
    }),
    case("framing/types-of-the-server-are-enosys", |c| {
        for ty in [op::WATCH_EVENT, op::ERROR] {
            c.dom0.fails(ty, "/tool|x|", "ENOSYS")?;
        }
        Ok(())
    }),
    case("order/unknown-transaction-before-malformed-payload", |c| {
        c.dom0.fails_in(99, op::READ, "no-nul", "ENOENT")
    }),
    case("order/unknown-type-before-unknown-transaction", |c| {
        c.dom0.fails_in(99, 27, "", "ENOSYS")
    }),
    guest("order/privilege-before-unknown-transaction", |c| {
        c.guest()?.conn.fails_in(99, op::RELEASE, "5|", "EACCES")
    }),
    guest("order/privilege-before-malformed-payload", |c| {
        let mut guest = c.guest()?.conn;
        for ty in [
            op::CONTROL,
            op::INTRODUCE,
            op::RELEASE,
            op::IS_DOMAIN_INTRODUCED,
            op::RESUME,
            op::SET_TARGET,
        ] {
            guest.fails(ty, "junk", "EACCES").map_err(|e| format!("{ty}: {e}"))?;
        }
        Ok(())
    }),
    guest("order/privilege-of-newer-requests", |c| {
        let mut guest = c.guest()?.conn;
        for ty in [op::SET_FEATURE, op::GET_QUOTA, op::SET_QUOTA] {
            guest.fails(ty, "junk", "EACCES").map_err(|e| format!("{ty}: {e}"))?;
        }
        Ok(())
    }),
    guest("framing/long-pipelines-over-a-ring", |c| {
        let mut guest = c.guest()?.conn;
        guest.ok(op::WRITE, "a|1")?;
        for id in 1..=15 {
            guest.send(&frame(op::READ, id, 0, b"a\0"))?;
        }
        for id in 1..=15 {
            let reply = guest.reply()?;
            if (reply.ty, reply.req_id, &reply.payload[..]) != (op::READ, id, b"1") {
                return Err(format!("{reply:?} where {id} belongs"));
            }
        }
        Ok(())
    }),
    guest("framing/long-messages-over-a-ring", |c| {
        let mut guest = c.guest()?.conn;
        let value = "y".repeat(1900);
        guest.gives(op::WRITE, &format!("a|{value}"), "OK|")?;
        guest.gives(op::READ, "a|", &value)
    }),
    case("framing/nothing-is-said-unasked", |c| {
        c.dom0.ok(op::WRITE, &format!("{}|x", c.base))?;
        // A round trip shows that the daemon sent nothing before.
        c.dom0.start(op::READ, 0, b"/tool\0")?;
        match c.dom0.message(PATIENCE)? {
            Some(message) if message.ty == op::READ => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }),
];
