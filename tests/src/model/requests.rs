//! Requests on nodes.

use super::parse::{domid, exactly, number, path, strings};
use super::{Entry, Model, Node, Outcome, Tree, children, is_below, parent};

/// The tree that a request works on, and what it did.
pub(super) struct Place<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) changes: &'a mut Vec<(String, bool)>,
    /// Nodes of the caller besides those in `tree`: what others did since a transaction started.
    pub(super) nodes_elsewhere: isize,
}

pub(super) fn owned(tree: &Tree, domid: u16) -> isize {
    let count = tree.values().filter(|node| node.perms[0].1 == domid).count();
    isize::try_from(count).expect("small")
}

fn ok() -> Outcome {
    Ok(b"OK\0".to_vec())
}

fn size(tree: &Tree, path: &str) -> usize {
    let node = &tree[path];
    let names: usize = children(tree, path).iter().map(|p| name(p).len() + 1).sum();
    16 + 8 * node.perms.len() + node.value.len() + names
}

fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

impl Model {
    /// The path that the caller means.
    pub(super) fn resolve(&self, conn: u32, text: &[u8]) -> Result<String, &'static str> {
        let text = path(text)?;
        let full = match text.as_bytes()[0] {
            b'/' | b'@' => text.to_owned(),
            _ => format!("/local/domain/{}/{text}", self.domid(conn)),
        };
        let mut counted = full.as_str();
        if let Some(rest) = full.strip_prefix("/local/domain/")
            && let Some((id, below)) = rest.split_once('/')
            && domid(id.as_bytes()).is_ok()
        {
            counted = below;
        }
        if full.len() > 3072 || self.exceeds(conn, "path-max", counted.len()) {
            return Err("EINVAL");
        }
        Ok(full)
    }

    fn ordinary(&self, conn: u32, text: &[u8]) -> Result<String, &'static str> {
        let path = self.resolve(conn, text)?;
        if path.starts_with('@') { Err("EINVAL") } else { Ok(path) }
    }

    /// May the caller do this to the node, and is it there? Absence is reported only to those who might
    /// do it to the nearest ancestor.
    fn reach(&self, conn: u32, tree: &Tree, path: &str, what: u8) -> Result<(), &'static str> {
        let mut at = path.to_owned();
        while !tree.contains_key(&at) {
            at = parent(&at);
        }
        match self.allowed(conn, &tree[&at].perms, what) {
            false => Err("EACCES"),
            true if at == path => Ok(()),
            true => Err("ENOENT"),
        }
    }

    pub(super) fn on_nodes(
        &mut self,
        conn: u32,
        place: &mut Place<'_>,
        ty: u32,
        payload: &[u8],
    ) -> Outcome {
        match ty {
            11 => {
                let (texts, _) = strings(payload);
                let path = self.ordinary(conn, texts.first().ok_or("EINVAL")?)?;
                self.write(conn, place, &path, &payload[texts[0].len() + 1..])
            }
            14 => self.set_perms(conn, place, payload),
            22 => {
                let texts = exactly(payload, 2)?;
                let (path, offset) = (path(texts[0])?, number(texts[1], u64::MAX)?);
                let path = self.ordinary(conn, path.as_bytes())?;
                self.reach(conn, place.tree, &path, b'r')?;
                Ok(part(place.tree, &path, offset))
            }
            3 => {
                let path = self.resolve(conn, exactly(payload, 1)?[0])?;
                self.reach(conn, place.tree, &path, b'r')?;
                let perms = place.tree[&path].perms.iter();
                let text: String =
                    perms.map(|(letter, id, _)| format!("{}{id}\0", *letter as char)).collect();
                Ok(text.into_bytes())
            }
            _ => {
                let path = self.ordinary(conn, exactly(payload, 1)?[0])?;
                match ty {
                    12 => self.mkdir(conn, place, &path),
                    13 => self.rm(conn, place, &path),
                    _ => {
                        self.reach(conn, place.tree, &path, b'r')?;
                        match ty {
                            2 => Ok(place.tree[&path].value.clone()),
                            _ => Ok(names(place.tree, &path)).and_then(|list| {
                                if list.len() > 4096 { Err("E2BIG") } else { Ok(list) }
                            }),
                        }
                    }
                }
            }
        }
    }

    fn write(&mut self, conn: u32, place: &mut Place<'_>, path: &str, value: &[u8]) -> Outcome {
        match self.reach(conn, place.tree, path, b'w') {
            Ok(()) => {
                let size = size(place.tree, path) - place.tree[path].value.len() + value.len();
                if self.exceeds(conn, "node-size", size) {
                    return Err("ENOSPC");
                }
                place.tree.get_mut(path).expect("reached").value = value.to_vec();
            }
            Err("ENOENT") => self.create(conn, place, path, value)?,
            Err(name) => return Err(name),
        }
        place.changes.push((path.into(), false));
        ok()
    }

    fn mkdir(&mut self, conn: u32, place: &mut Place<'_>, path: &str) -> Outcome {
        match self.reach(conn, place.tree, path, b'w') {
            Ok(()) => return ok(),
            Err("ENOENT") => self.create(conn, place, path, b"")?,
            Err(name) => return Err(name),
        }
        place.changes.push((path.into(), false));
        ok()
    }

    fn create(
        &mut self,
        conn: u32,
        place: &mut Place<'_>,
        path: &str,
        value: &[u8],
    ) -> Result<(), &'static str> {
        // Try it on a copy, then look whether it was within the limits.
        let mut tree = place.tree.clone();
        let mut missing = Vec::new();
        let mut at = path.to_owned();
        while !tree.contains_key(&at) {
            missing.push(at.clone());
            at = parent(&at);
        }
        let mut perms = tree[&at].perms.clone();
        if !self.privileged(conn) {
            perms[0].1 = self.domid(conn);
        }
        let mut clock = self.clock;
        for path in missing.iter().rev() {
            clock += 1;
            let node = Node { value: Vec::new(), perms: perms.clone(), created: clock };
            tree.insert(path.clone(), node);
        }
        tree.get_mut(path).expect("created").value = value.to_vec();
        let too_large = missing
            .iter()
            .chain([&at])
            .any(|path| self.exceeds(conn, "node-size", size(&tree, path)));
        let nodes = owned(&tree, self.domid(conn)) + place.nodes_elsewhere;
        let nodes = usize::try_from(nodes).unwrap_or(0);
        if too_large || self.exceeds(conn, "nodes", nodes) {
            return Err("ENOSPC");
        }
        self.clock = clock;
        *place.tree = tree;
        Ok(())
    }

    fn rm(&mut self, conn: u32, place: &mut Place<'_>, path: &str) -> Outcome {
        match self.reach(conn, place.tree, path, b'w') {
            Ok(()) if path == "/" => Err("EINVAL"),
            Ok(()) => {
                place.tree.retain(|p, _| p != path && !is_below(p, path));
                place.changes.push((path.into(), true));
                ok()
            }
            Err("ENOENT") if place.tree.contains_key(&parent(path)) => ok(),
            Err(name) => Err(name),
        }
    }

    fn set_perms(&mut self, conn: u32, place: &mut Place<'_>, payload: &[u8]) -> Outcome {
        let (texts, _) = strings(payload);
        let (first, entries) = texts.split_first().ok_or("EINVAL")?;
        path(first)?;
        let mut perms: Vec<Entry> = Vec::new();
        for text in entries {
            let (letter, id) = text.split_first().ok_or("EINVAL")?;
            if !b"nrwb".contains(letter) {
                return Err("EINVAL");
            }
            perms.push((*letter, domid(id)?, false));
        }
        if perms.is_empty() {
            return Err("EINVAL");
        }
        let path = self.resolve(conn, first)?;
        if self.exceeds(conn, "node-permissions", perms.len()) {
            return Err("ENOSPC");
        }
        if !self.find(perms[0].1) {
            return Err("ENOENT");
        }
        let any = self.features(conn) & 8 != 0;
        for entry in &mut perms {
            let any_domain = entry.1 == 32757 && any;
            entry.2 = !any_domain && !self.find(entry.1);
        }
        self.reach(conn, place.tree, &path, b'w')?;
        let old = &place.tree[&path].perms;
        if !self.owns(conn, old) {
            return Err("EACCES");
        }
        if !self.privileged(conn) && old[0].1 != perms[0].1 {
            return Err("EPERM");
        }
        let size = size(place.tree, &path) - 8 * old.len() + 8 * perms.len();
        if self.exceeds(conn, "node-size", size) {
            return Err("ENOSPC");
        }
        place.tree.get_mut(&path).expect("reached").perms = perms;
        place.changes.push((path, false));
        ok()
    }
}

fn names(tree: &Tree, path: &str) -> Vec<u8> {
    children(tree, path).iter().flat_map(|p| format!("{}\0", name(p)).into_bytes()).collect()
}

/// The generation is left out: a 0 stands for it, of 1 byte. Lists of models are short enough to
/// fit one part whatever its length.
fn part(tree: &Tree, path: &str, offset: u64) -> Vec<u8> {
    let list = names(tree, path);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(list.len());
    [b"0\0", &list[start..], b"\0"].concat()
}
