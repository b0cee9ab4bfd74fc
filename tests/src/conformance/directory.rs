//! DIRECTORY and DIRECTORY_PART.

use super::{Case, Ctx, case, guest};
use crate::raw::{bytes, op, text};

/// Creates children with names of about `len` bytes. Returns the list that DIRECTORY must return.
fn children(c: &mut Ctx<'_>, count: usize, len: usize) -> Result<String, String> {
    let mut list = String::new();
    for i in 0..count {
        // The order of creation is not that of the names.
        let name = format!("{:0len$}", (i * 7) % count);
        c.dom0.ok(op::WRITE, &format!("{}|", c.at(&name)))?;
        list += &(name + "|");
    }
    Ok(list)
}

/// Reads a list in parts, which must have the same generation.
fn in_parts(c: &mut Ctx<'_>, tx: u32) -> Result<(String, usize), String> {
    let (mut list, mut generation, mut parts) = (Vec::new(), None, 0);
    loop {
        let payload = bytes(&format!("{}|{}|", c.base, list.len()));
        let reply = c.dom0.ask(op::DIRECTORY_PART, tx, &payload)??;
        let end = reply.iter().position(|b| *b == 0).ok_or("no generation")?;
        let number = reply[..end].to_vec();
        if *generation.get_or_insert(number.clone()) != number {
            return Err("the generation changed, the list did not".into());
        }
        parts += 1;
        let part = &reply[end + 1..];
        if part == b"\0" || part.ends_with(b"\0\0") {
            list.extend_from_slice(&part[..part.len() - 1]);
            return Ok((text(&list), parts));
        }
        if part.is_empty() || !part.ends_with(b"\0") {
            return Err(format!("a part that does not end with a name: {:?}", text(part)));
        }
        list.extend_from_slice(part);
    }
}

pub(super) const CASES: &[Case] = &[
    case("directory/children-in-order-of-creation", |c| {
        for name in ["c", "a", "b"] {
            c.dom0.ok(op::WRITE, &format!("{}|", c.at(name)))?;
        }
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "c|a|b|")?;
        c.dom0.ok(op::RM, &format!("{}|", c.at("a")))?;
        c.dom0.ok(op::WRITE, &format!("{}|", c.at("a")))?;
        c.dom0.ok(op::WRITE, &format!("{}|again", c.at("c")))?;
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "c|b|a|")
    }),
    case("directory/no-children", |c| c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "")),
    case("directory/missing-is-enoent", |c| {
        c.dom0.fails(op::DIRECTORY, &format!("{}|", c.at("a")), "ENOENT")
    }),
    guest("directory/needs-read-access", |c| {
        let mut guest = c.guest()?;
        let path = c.node("a", "", &format!("n0|w{}|", guest.domid))?;
        guest.conn.fails(op::DIRECTORY, &format!("{path}|"), "EACCES")?;
        guest.conn.fails(op::DIRECTORY_PART, &format!("{path}|0|"), "EACCES")
    }),
    case("directory/in-a-transaction", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::MKDIR, &format!("{}|", c.at("a")), "OK|")?;
        c.dom0.gives_in(tx, op::DIRECTORY, &format!("{}|", c.base), "a|")?;
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "")?;
        c.dom0.end(tx, "F|", "OK|")
    }),
    case("directory/4096-bytes-fit", |c| {
        let list = children(c, 64, 63)?;
        if list.len() != 4096 {
            return Err(format!("the case is wrong: {}", list.len()));
        }
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), &list)
    }),
    case("directory/over-4096-bytes-is-e2big", |c| {
        children(c, 65, 63)?;
        c.dom0.fails(op::DIRECTORY, &format!("{}|", c.base), "E2BIG")?;
        let tx = c.dom0.begin()?;
        c.dom0.fails_in(tx, op::DIRECTORY, &format!("{}|", c.base), "E2BIG")?;
        c.dom0.end(tx, "F|", "OK|")
    }),
    case("directory_part/short-list-in-one-part", |c| {
        let list = children(c, 3, 4)?;
        match in_parts(c, 0)? {
            (got, 1) if got == list => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }),
    case("directory_part/long-list-in-parts", |c| {
        let list = children(c, 300, 40)?;
        match in_parts(c, 0)? {
            (got, 4) if got == list => Ok(()),
            (got, parts) => Err(format!("{parts} parts, equal: {}", got == list)),
        }
    }),
    case("directory_part/in-a-transaction", |c| {
        let list = children(c, 150, 40)?;
        let tx = c.dom0.begin()?;
        let (got, _) = in_parts(c, tx)?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{}|v", c.at("new")), "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        if got == list { Ok(()) } else { Err(got) }
    }),
    case("directory_part/no-children", |c| match in_parts(c, 0)? {
        (got, 1) if got.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    }),
    case("directory_part/beyond-the-end", |c| {
        children(c, 3, 4)?;
        let reply = c.dom0.ok(op::DIRECTORY_PART, &format!("{}|100|", c.base))?;
        if reply.ends_with("||") && reply.matches('|').count() == 2 { Ok(()) } else { Err(reply) }
    }),
    case("directory_part/inside-a-name", |c| {
        children(c, 3, 4)?;
        let reply = c.dom0.ok(op::DIRECTORY_PART, &format!("{}|2|", c.base))?;
        let part = reply.split_once('|').map(|(_, part)| part.to_owned());
        if part.as_deref() == Some("00|0001|0002||") { Ok(()) } else { Err(reply) }
    }),
    case("directory_part/generation-changes-with-the-list", |c| {
        let mut generation = || {
            let reply = c.dom0.ok(op::DIRECTORY_PART, &format!("{}|0|", c.base))?;
            Ok::<_, String>(reply.split('|').next().map(String::from))
        };
        let first = generation()?;
        if generation()? != first {
            return Err("changes by itself".into());
        }
        c.dom0.ok(op::MKDIR, &format!("{}|", c.at("x")))?;
        let reply = c.dom0.ok(op::DIRECTORY_PART, &format!("{}|0|", c.base))?;
        if reply.split('|').next().map(String::from) == first {
            return Err("does not change with the list".into());
        }
        Ok(())
    }),
    case("directory_part/malformed-is-einval", |c| {
        for payload in ["/tool|", "/tool", "", "/tool|0|x|"] {
            c.dom0.fails(op::DIRECTORY_PART, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("directory_part/junk-offset-is-einval", |c| {
        for payload in ["/tool|x|", "/tool|-1|", "/tool||"] {
            c.dom0.fails(op::DIRECTORY_PART, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("directory_part/missing-is-enoent", |c| {
        c.dom0.fails(op::DIRECTORY_PART, &format!("{}|0|", c.at("a")), "ENOENT")
    }),
    guest("directory_part/guests-may-use-it", |c| {
        let mut guest = c.guest()?;
        guest.conn.ok(op::WRITE, "d/x|1")?;
        let reply = guest.conn.ok(op::DIRECTORY_PART, "d|0|")?;
        if reply.ends_with("|x||") { Ok(()) } else { Err(reply) }
    }),
];
