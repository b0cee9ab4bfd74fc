//! Domains: introduction, release, shutdown, destruction; targets; special watches.

use super::{Case, case, guest};
use crate::fake_guest::PORT;
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    case("get_domain_path/of-any-domid", |c| {
        for domid in [0, 5, 65535] {
            let expected = format!("/local/domain/{domid}|");
            c.dom0.gives(op::GET_DOMAIN_PATH, &format!("{domid}|"), &expected)?;
        }
        Ok(())
    }),
    case("get_domain_path/malformed-is-einval", |c| {
        for payload in ["", "5", "|", "65536|", "-1|", "abc|", "5x|", "5|6|"] {
            c.dom0.fails(op::GET_DOMAIN_PATH, payload, "EINVAL")?;
        }
        Ok(())
    }),
    guest("get_domain_path/guests-may-ask", |c| {
        c.guest()?.conn.gives(op::GET_DOMAIN_PATH, "5|", "/local/domain/5|")
    }),
    case("is_introduced/dom0-and-self-are", |c| {
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, "0|", "T|")?;
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, "32752|", "T|")
    }),
    case("is_introduced/others-are-not", |c| c.dom0.gives(op::IS_DOMAIN_INTRODUCED, "4999|", "F|")),
    case("is_introduced/malformed-is-einval", |c| {
        for payload in ["", "|", "x|", "65536|"] {
            c.dom0.fails(op::IS_DOMAIN_INTRODUCED, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("introduce/malformed-is-einval", |c| {
        for payload in ["", "5|", "5|1|", "5|1|1", "x|1|1|", "65536|1|1|"] {
            c.dom0.fails(op::INTRODUCE, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("introduce/port-0-is-einval", |c| c.dom0.fails(op::INTRODUCE, "4998|1|0|", "EINVAL")),
    guest("introduce/connects-and-fires", |c| {
        let mut watcher = c.another()?;
        watcher.watch("@introduceDomain|t|")?;
        let mut guest = c.guest()?;
        watcher.event("@introduceDomain|t|")?;
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{}|", guest.domid), "T|")?;
        guest.conn.gives(op::READ, &format!("{}|", guest.home), "")
    }),
    guest("introduce/again-drops-watches-and-transactions", |c| {
        let guest = c.guest()?;
        let (domid, mut conn) = (guest.domid, guest.conn);
        conn.watch("x|t|")?;
        let tx = conn.begin()?;
        let mut watcher = c.another()?;
        watcher.watch("@introduceDomain|t|")?;
        c.dom0.gives(op::INTRODUCE, &format!("{domid}|1|{PORT}|"), "OK|")?;
        watcher.events(&[])?;
        conn.end(tx, "T|", "ENOENT")?;
        conn.fails(op::UNWATCH, "x|t|", "ENOENT")
    }),
    case("release/malformed-is-einval", |c| {
        for payload in ["", "|", "5", "x|", "65536|"] {
            c.dom0.fails(op::RELEASE, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("release/unknown-is-enoent", |c| c.dom0.fails(op::RELEASE, "4997|", "ENOENT")),
    case("release/dom0-is-einval", |c| c.dom0.fails(op::RELEASE, "0|", "EINVAL")),
    guest("release/removes-what-the-domain-owned", |c| {
        let mut guest = c.guest()?;
        guest.conn.ok(op::WRITE, "data/x|1")?;
        let mixed = c.node("mixed", "", "n0|")?;
        let domid = guest.domid;
        c.node("mixed/owned", "", &format!("n{domid}|"))?;
        c.node("mixed/owned/not", "", "n0|")?;
        let named = c.node("named", "", &format!("n0|r{domid}|"))?;
        c.dom0.gives(op::RELEASE, &format!("{domid}|"), "OK|")?;
        c.dom0.fails(op::READ, &format!("{}|", guest.home), "ENOENT")?;
        c.dom0.fails(op::READ, &format!("{mixed}/owned/not|"), "ENOENT")?;
        c.dom0.gives(op::READ, &format!("{mixed}|"), "")?;
        c.dom0.gives(op::READ, &format!("{named}|"), "")?;
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{domid}|"), "F|")
    }),
    guest("release/removes-entries-from-permissions", |c| {
        let guest = c.guest()?;
        let path = c.node("named", "", &format!("n0|r{}|", guest.domid))?;
        c.dom0.gives(op::RELEASE, &format!("{}|", guest.domid), "OK|")?;
        c.dom0.gives(op::GET_PERMS, &format!("{path}|"), "n0|")
    }),
    guest("release/is-told-after-the-removal", |c| {
        let guest = c.guest()?;
        let mut watcher = c.another()?;
        watcher.watch("@releaseDomain|r|")?;
        watcher.watch(&format!("{}|h|", guest.home))?;
        c.dom0.gives(op::RELEASE, &format!("{}|", guest.domid), "OK|")?;
        watcher.event(&format!("{}|h|", guest.home))?;
        watcher.event("@releaseDomain|r|")
    }),
    guest("death/removes-and-tells", |c| {
        let guest = c.guest()?;
        c.destroy(guest.domid)?;
        c.dom0.fails(op::READ, &format!("{}|", guest.home), "ENOENT")?;
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{}|", guest.domid), "F|")
    }),
    guest("shutdown/is-told-and-nothing-is-removed", |c| {
        let mut guest = c.guest()?;
        let mut watcher = c.another()?;
        watcher.watch("@releaseDomain|t|")?;
        c.shut_down(guest.domid)?;
        watcher.event("@releaseDomain|t|")?;
        c.dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{}|", guest.domid), "T|")?;
        guest.conn.ok(op::WRITE, "still|here").map(drop)
    }),
    guest("special/depth-1-carries-the-domid", |c| {
        let mut watcher = c.another()?;
        watcher.gives(op::WATCH, "@releaseDomain|t|1|", "OK|")?;
        watcher.event("@releaseDomain|t|")?;
        let guest = c.guest()?;
        c.dom0.gives(op::RELEASE, &format!("{}|", guest.domid), "OK|")?;
        watcher.event(&format!("@releaseDomain/{}|t|", guest.domid))
    }),
    guest("special/path-with-domid-is-about-that-domain", |c| {
        let (first, second) = (c.guest()?.domid, c.guest()?.domid);
        let mut watcher = c.another()?;
        watcher.watch(&format!("@releaseDomain/{second}|t|"))?;
        c.dom0.gives(op::RELEASE, &format!("{first}|"), "OK|")?;
        c.dom0.gives(op::RELEASE, &format!("{second}|"), "OK|")?;
        watcher.event(&format!("@releaseDomain/{second}|t|"))?;
        watcher.events(&[])
    }),
    guest("special/everybody-may-watch-releases", |c| {
        let mut guest = c.guest()?;
        guest.conn.watch("@releaseDomain|t|")?;
        let other = c.guest()?.domid;
        c.dom0.gives(op::RELEASE, &format!("{other}|"), "OK|")?;
        guest.conn.event("@releaseDomain|t|")
    }),
    guest("special/nobody-hears-of-introductions-without-rights", |c| {
        let mut guest = c.guest()?;
        guest.conn.watch("@introduceDomain|t|")?;
        c.guest()?;
        guest.conn.events(&[])
    }),
    guest("special/rights-can-be-given", |c| {
        let mut guest = c.guest()?;
        guest.conn.watch("@introduceDomain|t|")?;
        let before = c.dom0.ok(op::GET_PERMS, "@introduceDomain|")?;
        let with = format!("@introduceDomain|n0|r{}|", guest.domid);
        c.dom0.gives(op::SET_PERMS, &with, "OK|")?;
        guest.conn.events(&["@introduceDomain|t|"])?;
        let introduced = c.guest().and_then(|_| guest.conn.event("@introduceDomain|t|"));
        c.dom0.gives(op::SET_PERMS, &format!("@introduceDomain|{before}"), "OK|")?;
        introduced
    }),
    case("resume/malformed-is-einval", |c| {
        for payload in ["", "x|", "65536|"] {
            c.dom0.fails(op::RESUME, payload, "EINVAL")?;
        }
        Ok(())
    }),
    case("resume/unknown-is-enoent", |c| c.dom0.fails(op::RESUME, "4996|", "ENOENT")),
    case("resume/dom0-is-einval", |c| c.dom0.fails(op::RESUME, "0|", "EINVAL")),
    guest("resume/lets-shutdown-be-told-again", |c| {
        let guest = c.guest()?;
        let mut watcher = c.another()?;
        watcher.watch("@releaseDomain|t|")?;
        c.shut_down(guest.domid)?;
        watcher.event("@releaseDomain|t|")?;
        c.dom0.gives(op::RESUME, &format!("{}|", guest.domid), "OK|")?;
        c.shut_down(guest.domid)?;
        watcher.event("@releaseDomain|t|")
    }),
    case("set_target/malformed-is-einval", |c| {
        for payload in ["", "5|", "5|6", "5|6|7|"] {
            c.dom0.fails(op::SET_TARGET, payload, "EINVAL")?;
        }
        Ok(())
    }),
    guest("set_target/unknown-is-enoent", |c| {
        let domid = c.guest()?.domid;
        c.dom0.fails(op::SET_TARGET, &format!("4995|{domid}|"), "ENOENT")?;
        c.dom0.fails(op::SET_TARGET, &format!("{domid}|4995|"), "ENOENT")
    }),
    guest("disconnect/a-released-guest-is-not-answered", |c| {
        let mut guest = c.guest()?;
        guest.conn.gives(op::MKDIR, "alive|", "OK|")?;
        c.dom0.gives(op::RELEASE, &format!("{}|", guest.domid), "OK|")?;
        // A ring has no visible end: it delivers nothing any more.
        let _ = guest.conn.send(&crate::raw::frame(op::MKDIR, 1, 0, b"dead\0"));
        match guest.conn.message(std::time::Duration::from_millis(100)) {
            Ok(Some(message)) => Err(format!("answered: {message:?}")),
            Ok(None) | Err(_) => Ok(()),
        }
    }),
];
