//! Paths: syntax, length, and the meaning of relative and special paths.

use super::{Case, case, guest};
use crate::raw::op;

/// Malformed paths.
const MALFORMED: &[&str] = &[
    "",
    "//",
    "/a/",
    "a/",
    "/a//b",
    "//a",
    "/a.b",
    "/a:b",
    "/a b",
    "/a\n",
    "/\u{e9}",
    "/a,b",
    "/a*",
    "/local/domain/",
    "/local/domain/5/",
    "/local/domain//x",
    "/local/domain/5//x",
];

const ONE_PATH: &[u32] = &[op::READ, op::DIRECTORY, op::MKDIR, op::RM, op::GET_PERMS];

pub(super) const CASES: &[Case] = &[
    case("paths/malformed-ones-are-einval", |c| {
        for path in MALFORMED {
            for ty in ONE_PATH {
                c.dom0.fails(*ty, &format!("{path}|"), "EINVAL")?;
            }
            c.dom0.fails(op::WRITE, &format!("{path}|v"), "EINVAL")?;
            c.dom0.fails(op::SET_PERMS, &format!("{path}|n0|"), "EINVAL")?;
        }
        Ok(())
    }),
    case("paths/malformed-watches-are-einval", |c| {
        for path in MALFORMED {
            c.dom0.fails(op::WATCH, &format!("{path}|t|"), "EINVAL")?;
        }
        Ok(())
    }),
    case("paths/malformed-in-a-transaction", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.fails_in(tx, op::READ, "/a//b|", "EINVAL")?;
        c.dom0.end(tx, "T|", "OK|")
    }),
    case("paths/all-legal-characters", |c| {
        let path = c.at("AZaz09-_@");
        c.dom0.gives(op::WRITE, &format!("{path}|v"), "OK|")?;
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "AZaz09-_@|")
    }),
    case("paths/missing-nul-is-einval", |c| {
        for ty in ONE_PATH {
            c.dom0.fails(*ty, "/tool", "EINVAL")?;
        }
        c.dom0.fails(op::WRITE, "/tool", "EINVAL")
    }),
    case("paths/bytes-behind-the-nul-are-einval", |c| {
        for ty in ONE_PATH {
            c.dom0.fails(*ty, "/tool|x", "EINVAL")?;
            c.dom0.fails(*ty, "/tool|x|", "EINVAL")?;
        }
        Ok(())
    }),
    case("paths/empty-payload-is-einval", |c| {
        for ty in ONE_PATH.iter().chain(&[op::WRITE, op::WATCH, op::UNWATCH, op::SET_PERMS]) {
            c.dom0.fails(*ty, "", "EINVAL")?;
        }
        Ok(())
    }),
    case("paths/relative-is-below-local-domain-0-on-a-socket", |c| {
        let name = c.base.trim_start_matches('/').to_owned();
        c.dom0.gives(op::WRITE, &format!("{name}|v"), "OK|")?;
        c.dom0.gives(op::READ, &format!("/local/domain/0/{name}|"), "v")?;
        c.dom0.gives(op::RM, &format!("{name}|"), "OK|")
    }),
    guest("paths/relative-is-below-the-own-home", |c| {
        let mut guest = c.guest()?;
        guest.conn.gives(op::WRITE, "a/b|v", "OK|")?;
        c.dom0.gives(op::READ, &format!("{}/a/b|", guest.home), "v")
    }),
    case("paths/special-ones-are-no-nodes", |c| {
        for path in ["@introduceDomain", "@releaseDomain", "@other"] {
            for ty in [op::READ, op::DIRECTORY, op::MKDIR, op::RM] {
                c.dom0.fails(ty, &format!("{path}|"), "EINVAL")?;
            }
            c.dom0.fails(op::WRITE, &format!("{path}|v"), "EINVAL")?;
        }
        Ok(())
    }),
    case("paths/special-ones-have-permissions", |c| {
        for path in ["@introduceDomain", "@releaseDomain"] {
            let perms = c.dom0.ok(op::GET_PERMS, &format!("{path}|"))?;
            c.dom0.gives(op::SET_PERMS, &format!("{path}|{perms}"), "OK|")?;
            c.dom0.gives(op::GET_PERMS, &format!("{path}|"), &perms)?;
        }
        Ok(())
    }),
    case("paths/unknown-special-ones-are-enoent", |c| {
        c.dom0.fails(op::GET_PERMS, "@other|", "ENOENT")
    }),
    case("paths/special-ones-are-not-listed", |c| {
        let names = c.dom0.ok(op::DIRECTORY, "/|")?;
        match names.contains('@') {
            false => Ok(()),
            true => Err(names),
        }
    }),
    case("paths/3072-bytes-are-allowed", |c| {
        let path = format!("{}/{}", c.base, "p".repeat(3072 - c.base.len() - 1));
        c.dom0.gives(op::WRITE, &format!("{path}|v"), "OK|")?;
        c.dom0.gives(op::READ, &format!("{path}|"), "v")
    }),
    case("paths/3073-bytes-are-einval", |c| {
        let path = format!("{}/{}", c.base, "p".repeat(3073 - c.base.len() - 1));
        c.dom0.fails(op::WRITE, &format!("{path}|v"), "EINVAL")?;
        c.dom0.fails(op::WATCH, &format!("{path}|t|"), "EINVAL")
    }),
    guest("paths/guests-have-2048-bytes-below-their-home", |c| {
        let mut guest = c.guest()?;
        // Within the limits of a node: many short names, not one long name.
        let path = |len: usize| "ab/".repeat(len).chars().take(len).collect::<String>();
        let longest = path(2047) + "x";
        guest.conn.fails(op::READ, &format!("{longest}|"), "ENOENT")?;
        let absolute = format!("{}/{longest}", guest.home);
        guest.conn.fails(op::READ, &format!("{absolute}|"), "ENOENT")
    }),
    guest("paths/guests-do-not-have-2049-bytes", |c| {
        let mut guest = c.guest()?;
        let path = "ab/".repeat(683).chars().take(2048).collect::<String>() + "x";
        guest.conn.fails(op::READ, &format!("{path}|"), "EINVAL")?;
        guest.conn.fails(op::READ, &format!("{}/{path}|", guest.home), "EINVAL")
    }),
];
