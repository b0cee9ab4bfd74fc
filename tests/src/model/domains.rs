//! Domains, features and quotas.

use super::parse::{domid, exactly, number, strings};
use super::{Model, Outcome, QUOTAS, Step, children, is_below};

fn ok() -> Outcome {
    Ok(b"OK\0".to_vec())
}

fn quota_name(text: &[u8]) -> Result<&'static str, &'static str> {
    let found = QUOTAS.iter().find(|(name, _)| name.as_bytes() == text);
    found.map(|(name, _)| *name).ok_or("EINVAL")
}

impl Model {
    pub(super) fn domain_request(&mut self, conn: u32, ty: u32, payload: &[u8]) -> Outcome {
        match ty {
            8 => {
                let (texts, _) = strings(payload);
                if texts.len() < 3 {
                    return Err("EINVAL");
                }
                let domid = domid(texts[0])?;
                number(texts[1], u64::MAX)?;
                if number(texts[2], u32::MAX.into())? == 0 {
                    return Err("EINVAL");
                }
                self.introduce(domid)
            }
            23 if payload.is_empty() => Ok(format!("{}\0", self.features(conn)).into_bytes()),
            23 => {
                let domid = domid(exactly(payload, 1)?[0])?;
                if !self.privileged(conn) {
                    return Err("EACCES");
                }
                if !self.find(domid) {
                    return Err("ENOENT");
                }
                Ok(format!("{}\0", self.domains[&domid].features).into_bytes())
            }
            25 | 26 => self.quota(ty == 26, payload),
            19 | 24 => {
                let texts = exactly(payload, 2)?;
                let first = domid(texts[0])?;
                if ty == 24 {
                    let value = number(texts[1], u32::MAX.into())?;
                    return self.set_feature(first, u32::try_from(value).expect("checked"));
                }
                self.set_target(first, domid(texts[1])?)
            }
            _ => {
                let domid = domid(exactly(payload, 1)?[0])?;
                let introduced = self.domains.get(&domid).is_some_and(|d| d.introduced);
                match ty {
                    10 => Ok(format!("/local/domain/{domid}\0").into_bytes()),
                    17 if introduced || domid == 32752 => Ok(b"T\0".to_vec()),
                    17 => Ok(b"F\0".to_vec()),
                    _ if domid == 0 => Err("EINVAL"),
                    _ if !introduced => Err("ENOENT"),
                    18 => {
                        self.domains.get_mut(&domid).expect("introduced").shutdown = false;
                        ok()
                    }
                    _ => {
                        self.destroy(domid);
                        ok()
                    }
                }
            }
        }
    }

    fn introduce(&mut self, domid: u16) -> Outcome {
        if domid >= 0x7ff0 {
            return Err("EINVAL");
        }
        if !self.find(domid) {
            return Err("ENOENT");
        }
        let domain = self.domains.get_mut(&domid).expect("found");
        if std::mem::replace(&mut domain.introduced, true) {
            for conn in self.conns_of(domid) {
                self.reset(conn);
            }
        } else {
            self.fire_special("@introduceDomain", domid);
        }
        ok()
    }

    fn set_target(&mut self, domid: u16, target: u16) -> Outcome {
        let introduced = |id: u16| self.domains.get(&id).is_some_and(|d| d.introduced);
        if !introduced(domid) || !introduced(target) {
            return Err("ENOENT");
        }
        self.domains.get_mut(&domid).expect("introduced").target = Some(target);
        ok()
    }

    fn set_feature(&mut self, domid: u16, value: u32) -> Outcome {
        if !self.find(domid) {
            return Err("ENOENT");
        }
        let domain = self.domains.get_mut(&domid).expect("found");
        if domain.introduced {
            return Err("EBUSY");
        }
        if value > 15 {
            return Err("EINVAL");
        }
        domain.features = value;
        ok()
    }

    fn quota(&mut self, set: bool, payload: &[u8]) -> Outcome {
        let (texts, rest) = strings(payload);
        let (least, most) = if set { (2, 3) } else { (0, 2) };
        if !rest.is_empty() || texts.len() < least || texts.len() > most {
            return Err("EINVAL");
        }
        if texts.is_empty() {
            let names: Vec<&str> = QUOTAS.iter().map(|(name, _)| *name).collect();
            return Ok(format!("{}\0", names.join(" ")).into_bytes());
        }
        let id = if texts.len() == most { Some(domid(texts[0])?) } else { None };
        let name = quota_name(texts[texts.len() - if set { 2 } else { 1 }])?;
        let value = match set {
            true => Some(number(texts[texts.len() - 1], u64::from(u32::MAX) - 1)?),
            false => None,
        };
        if id.is_some_and(|id| !self.find(id)) {
            return Err("ENOENT");
        }
        let quotas = match id {
            Some(id) => &mut self.domains.get_mut(&id).expect("found").quotas,
            None => &mut self.defaults,
        };
        match value {
            Some(value) => {
                quotas.insert(name, u32::try_from(value).expect("checked"));
                ok()
            }
            None => Ok(format!("{}\0", quotas[name]).into_bytes()),
        }
    }

    fn conns_of(&self, domid: u16) -> Vec<u32> {
        let conns = self.conns.iter().filter(|(_, conn)| conn.domid == Some(domid));
        conns.map(|(id, _)| *id).collect()
    }

    /// Destroys a domain. The store checks all domains.
    pub fn domain_died(&mut self, domid: u16) {
        self.alive.remove(&domid);
        self.check_domains();
    }

    /// Shuts a domain down. The store checks all domains.
    pub fn domain_shut_down(&mut self, domid: u16) {
        self.alive.insert(domid, true);
        self.check_domains();
    }

    fn check_domains(&mut self) {
        for domid in self.domains.keys().copied().collect::<Vec<_>>() {
            match self.alive.get(&domid) {
                None => self.destroy(domid),
                Some(false) => {}
                Some(true) => {
                    let domain = self.domains.get_mut(&domid).expect("known");
                    if domain.introduced && !domain.shutdown {
                        domain.shutdown = true;
                        self.fire_special("@releaseDomain", domid);
                    }
                }
            }
        }
    }

    fn destroy(&mut self, domid: u16) {
        for conn in self.conns_of(domid) {
            self.conns.remove(&conn);
        }
        for domain in self.domains.values_mut() {
            domain.target = domain.target.filter(|target| *target != domid);
        }
        let old = self.tree.clone();
        let mut changes = Vec::new();
        for path in in_order(self, "/") {
            let owned = self.tree.get(&path).is_some_and(|node| node.perms[0].1 == domid);
            if owned && path != "/" {
                let before = self.tree.clone();
                self.tree.retain(|p, _| *p != path && !is_below(p, &path));
                changes.push(Step { path, removed: true, before, after: self.tree.clone() });
            }
        }
        for node in self.tree.values_mut() {
            if node.perms[0].1 == domid {
                node.perms[0].1 = 0;
            }
            // The entry of the owner, the first one, has changed above.
            node.perms.retain(|entry| entry.1 != domid);
        }
        let introduced = self.domains[&domid].introduced;
        let new = self.tree.clone();
        self.fire_changes(&changes, &old, &new);
        self.domains.remove(&domid);
        if introduced {
            self.fire_special("@releaseDomain", domid);
        }
    }
}

/// The paths of a node and all nodes below it: parents first, siblings in order of creation.
fn in_order(model: &Model, path: &str) -> Vec<String> {
    let mut found = vec![path.to_owned()];
    for child in children(&model.tree, path) {
        found.extend(in_order(model, &child));
    }
    found
}
