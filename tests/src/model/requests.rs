//! Requests on nodes.

use super::parse::{domid, exactly, number, path, strings};
use super::{Entry, Model, Node, Outcome, Tree, children, is_below, parent};

/// The tree that a request runs on, and its changes.
pub(super) struct NodeContext<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) changes: &'a mut Vec<(String, bool)>,
    /// The number of nodes of the caller that other requests have added since the transaction started.
    pub(super) nodes_elsewhere: isize,
}

pub(super) fn count_owned(tree: &Tree, domid: u16) -> isize {
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
    /// The path of the node for the caller.
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

    /// Succeeds if the node exists and the caller has the access `what`. Fails with ENOENT if it does
    /// not exist and the caller has this access to the nearest ancestor, otherwise with EACCES.
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

    pub(super) fn node_request(
        &mut self,
        conn: u32,
        cx: &mut NodeContext<'_>,
        ty: u32,
        payload: &[u8],
    ) -> Outcome {
        match ty {
            11 => {
                let (texts, _) = strings(payload);
                let path = self.ordinary(conn, texts.first().ok_or("EINVAL")?)?;
                self.write(conn, cx, &path, &payload[texts[0].len() + 1..])
            }
            14 => self.set_perms(conn, cx, payload),
            22 => {
                let texts = exactly(payload, 2)?;
                let (path, offset) = (path(texts[0])?, number(texts[1], u64::MAX)?);
                let path = self.ordinary(conn, path.as_bytes())?;
                self.reach(conn, cx.tree, &path, b'r')?;
                Ok(part(cx.tree, &path, offset))
            }
            3 => {
                let path = self.resolve(conn, exactly(payload, 1)?[0])?;
                self.reach(conn, cx.tree, &path, b'r')?;
                let perms = cx.tree[&path].perms.iter();
                let text: String =
                    perms.map(|(letter, id, _)| format!("{}{id}\0", *letter as char)).collect();
                Ok(text.into_bytes())
            }
            _ => {
                let path = self.ordinary(conn, exactly(payload, 1)?[0])?;
                match ty {
                    12 => self.mkdir(conn, cx, &path),
                    13 => self.rm(conn, cx, &path),
                    _ => {
                        self.reach(conn, cx.tree, &path, b'r')?;
                        match ty {
                            2 => Ok(cx.tree[&path].value.clone()),
                            _ => Ok(names(cx.tree, &path)).and_then(|list| {
                                if list.len() > 4096 { Err("E2BIG") } else { Ok(list) }
                            }),
                        }
                    }
                }
            }
        }
    }

    fn write(&mut self, conn: u32, cx: &mut NodeContext<'_>, path: &str, value: &[u8]) -> Outcome {
        match self.reach(conn, cx.tree, path, b'w') {
            Ok(()) => {
                let size = size(cx.tree, path) - cx.tree[path].value.len() + value.len();
                if self.exceeds(conn, "node-size", size) {
                    return Err("ENOSPC");
                }
                cx.tree.get_mut(path).expect("reached").value = value.to_vec();
            }
            Err("ENOENT") => self.create(conn, cx, path, value)?,
            Err(name) => return Err(name),
        }
        cx.changes.push((path.into(), false));
        ok()
    }

    fn mkdir(&mut self, conn: u32, cx: &mut NodeContext<'_>, path: &str) -> Outcome {
        match self.reach(conn, cx.tree, path, b'w') {
            Ok(()) => return ok(),
            Err("ENOENT") => self.create(conn, cx, path, b"")?,
            Err(name) => return Err(name),
        }
        cx.changes.push((path.into(), false));
        ok()
    }

    fn create(
        &mut self,
        conn: u32,
        cx: &mut NodeContext<'_>,
        path: &str,
        value: &[u8],
    ) -> Result<(), &'static str> {
        // Creates the nodes in a copy, then checks the limits.
        let mut tree = cx.tree.clone();
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
        let nodes = count_owned(&tree, self.domid(conn)) + cx.nodes_elsewhere;
        let nodes = usize::try_from(nodes).unwrap_or(0);
        if too_large || self.exceeds(conn, "nodes", nodes) {
            return Err("ENOSPC");
        }
        self.clock = clock;
        *cx.tree = tree;
        Ok(())
    }

    fn rm(&mut self, conn: u32, cx: &mut NodeContext<'_>, path: &str) -> Outcome {
        match self.reach(conn, cx.tree, path, b'w') {
            Ok(()) if path == "/" => Err("EINVAL"),
            Ok(()) => {
                cx.tree.retain(|p, _| p != path && !is_below(p, path));
                cx.changes.push((path.into(), true));
                ok()
            }
            Err("ENOENT") if cx.tree.contains_key(&parent(path)) => ok(),
            Err(name) => Err(name),
        }
    }

    fn set_perms(&mut self, conn: u32, cx: &mut NodeContext<'_>, payload: &[u8]) -> Outcome {
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
        self.reach(conn, cx.tree, &path, b'w')?;
        let old = &cx.tree[&path].perms;
        if !self.owns(conn, old) {
            return Err("EACCES");
        }
        if !self.privileged(conn) && old[0].1 != perms[0].1 {
            return Err("EPERM");
        }
        let size = size(cx.tree, &path) - 8 * old.len() + 8 * perms.len();
        if self.exceeds(conn, "node-size", size) {
            return Err("ENOSPC");
        }
        cx.tree.get_mut(&path).expect("reached").perms = perms;
        cx.changes.push((path, false));
        ok()
    }
}

fn names(tree: &Tree, path: &str) -> Vec<u8> {
    children(tree, path).iter().flat_map(|p| format!("{}\0", name(p)).into_bytes()).collect()
}

/// The reply to DIRECTORY_PART with the generation 0. The lists of the fuzz targets fit one part.
fn part(tree: &Tree, path: &str, offset: u64) -> Vec<u8> {
    let list = names(tree, path);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(list.len());
    [b"0\0", &list[start..], b"\0"].concat()
}
