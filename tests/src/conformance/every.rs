//! Rules for all requests of a kind: privilege, both limits, and transaction ids.

use super::{Case, Ctx, Outcome, case, guest};
use crate::raw::{Conn, op};

/// The requests that name a node, and the payload after the path.
const WITH_PATH: &[(u32, &str)] = &[
    (op::READ, "|"),
    (op::DIRECTORY, "|"),
    (op::DIRECTORY_PART, "|0|"),
    (op::GET_PERMS, "|"),
    (op::WRITE, "|v"),
    (op::MKDIR, "|"),
    (op::SET_PERMS, "|n0|"),
    (op::RM, "|"),
    (op::WATCH, "|t|"),
    (op::UNWATCH, "|t|"),
];

/// A path of `len` bytes below `base`, whose components have a length that all daemons accept.
fn path_of(base: &str, len: usize) -> String {
    let mut path = base.to_owned();
    while path.len() < len {
        let name = (len - path.len() - 1).clamp(1, 200);
        path += &format!("/{}", "p".repeat(name));
    }
    path
}

/// Each request with a path must (or must not) fail with EINVAL for this path.
fn each_says_einval(conn: &mut Conn, path: &str, expected: bool, but: &[u32]) -> Outcome {
    for (ty, rest) in WITH_PATH.iter().filter(|(ty, _)| !but.contains(ty)) {
        let answer = conn.tx(0, *ty, &format!("{path}{rest}"))?;
        let says = answer.as_ref().is_err_and(|name| name == "EINVAL");
        if says != expected {
            return Err(format!("type {ty}, path of {} bytes: {answer:?}", path.len()));
        }
        conn.events.clear();
    }
    Ok(())
}

fn in_a_transaction(c: &mut Ctx<'_>, requests: &[(u32, String, &str)]) -> Outcome {
    let tx = c.dom0.begin()?;
    for (ty, payload, expected) in requests {
        c.dom0.gives_in(tx, *ty, payload, expected)?;
    }
    c.dom0.end(tx, "F|", "OK|")
}

pub(super) const CASES: &[Case] = &[
    guest("every/path-of-a-guest-may-have-2048-bytes", |c| {
        let guest = c.guest()?;
        let path = path_of(&guest.home, guest.home.len() + 2049);
        let mut conn = guest.conn;
        each_says_einval(&mut conn, &path, false, &[])
    }),
    guest("every/path-of-a-guest-over-2048-bytes-is-einval", |c| {
        let guest = c.guest()?;
        let path = path_of(&guest.home, guest.home.len() + 2050);
        let mut conn = guest.conn;
        each_says_einval(&mut conn, &path, true, &[])
    }),
    case("every/path-of-3072-bytes-is-no-mistake", |c| {
        let path = path_of(&c.base, 3072);
        each_says_einval(&mut c.dom0, &path, false, &[])
    }),
    case("every/path-over-3072-bytes-is-einval", |c| {
        let path = path_of(&c.base, 3073);
        each_says_einval(&mut c.dom0, &path, true, &[])
    }),
    guest("every/request-of-the-control-domain-is-eacces-to-guests", |c| {
        let guest = c.guest()?;
        let (domid, mut conn) = (guest.domid, guest.conn);
        for (ty, payload) in [
            (op::CONTROL, "check|".into()),
            (op::INTRODUCE, format!("{domid}|1|1|")),
            (op::RELEASE, format!("{domid}|")),
            (op::IS_DOMAIN_INTRODUCED, format!("{domid}|")),
            (op::RESUME, format!("{domid}|")),
            (op::SET_TARGET, format!("{domid}|{domid}|")),
        ] {
            conn.fails(ty, &payload, "EACCES").map_err(|e| format!("{ty}: {e}"))?;
        }
        Ok(())
    }),
    guest("every/request-about-domains-works-in-a-transaction", |c| {
        let (a, b) = (c.guest()?.domid, c.guest()?.domid);
        let requests = [
            (op::INTRODUCE, format!("{a}|1|1|"), "OK|"),
            (op::RESUME, format!("{a}|"), "OK|"),
            (op::SET_TARGET, format!("{a}|{b}|"), "OK|"),
            (op::IS_DOMAIN_INTRODUCED, format!("{a}|"), "T|"),
            (op::RELEASE, format!("{a}|"), "OK|"),
            (op::IS_DOMAIN_INTRODUCED, format!("{a}|"), "F|"),
        ];
        in_a_transaction(c, &requests)
    }),
    guest("every/request-about-settings-works-in-a-transaction", |c| {
        let (a, fresh) = (c.guest()?.domid, c.create()?.0);
        let requests = [
            (op::SET_FEATURE, format!("{fresh}|2|"), "OK|"),
            (op::GET_FEATURE, format!("{fresh}|"), "2|"),
            (op::SET_QUOTA, format!("{a}|nodes|77|"), "OK|"),
            (op::GET_QUOTA, format!("{a}|nodes|"), "77|"),
        ];
        in_a_transaction(c, &requests)
    }),
    case("every/payload-of-4096-bytes-is-taken", |c| {
        let path = c.at("w");
        let token = "t".repeat(4096 - path.len() - 2);
        c.dom0.gives(op::WATCH, &format!("{path}|{token}|"), "OK|")?;
        c.dom0.gives(op::UNWATCH, &format!("{path}|{token}|"), "OK|")?;
        let node = c.node("n", "", "n0|")?;
        let perm = "r1|".repeat((4096 - node.len() - 4) / 3);
        c.dom0.ok(op::SET_PERMS, &format!("{node}|n0|{perm}"))?;
        let text = "x".repeat(4096 - "print||".len());
        c.dom0.gives(op::CONTROL, &format!("print|{text}|"), "OK|")
    }),
];
