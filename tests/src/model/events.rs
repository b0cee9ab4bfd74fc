//! Watches and events.

use super::parse::{number, path, strings};
use super::{Entry, Model, Outcome, Step, Tree, Watch, children, is_below, parent};

impl Model {
    pub(super) fn watch(&mut self, conn: u32, payload: &[u8]) -> Outcome {
        let (texts, _) = strings(payload);
        if texts.len() < 2 || texts.len() > 3 {
            return Err("EINVAL");
        }
        let spelled = path(texts[0])?.to_owned();
        let depth = match texts.get(2) {
            Some(text) => Some(number(text, u32::MAX.into())?),
            None => None,
        };
        if depth.is_some() && self.features(conn) & 4 == 0 {
            return Err("EINVAL");
        }
        let path = self.resolve(conn, texts[0])?;
        let token = texts[1].to_vec();
        let of_domain = self.watches_of_domain(conn);
        let watches = &mut self.conns.get_mut(&conn).expect("open").watches;
        if watches.iter().any(|watch| watch.path == path && watch.token == token) {
            return Err("EEXIST");
        }
        if self.exceeds(conn, "watches", of_domain + 1) {
            return Err("ENOSPC");
        }
        let watch = Watch { spelled, path, token, depth };
        self.conns.get_mut(&conn).expect("open").watches.push(watch);
        Ok(b"OK\0".to_vec())
    }

    fn watches_of_domain(&self, conn: u32) -> usize {
        let domid = self.domid(conn);
        let conns = self.conns.keys().filter(|other| self.domid(**other) == domid);
        conns.map(|conn| self.conns[conn].watches.len()).sum()
    }

    pub(super) fn unwatch(&mut self, conn: u32, payload: &[u8]) -> Outcome {
        let (texts, _) = strings(payload);
        if texts.len() != 2 {
            return Err("EINVAL");
        }
        let path = self.resolve(conn, texts[0])?;
        let conn = self.conns.get_mut(&conn).expect("open");
        let wanted = |watch: &Watch| watch.path == path && watch.token == texts[1];
        let Some(at) = conn.watches.iter().position(wanted) else { return Err("ENOENT") };
        let watch = conn.watches.remove(at);
        conn.events.retain(|(spelled, token)| !came_from(&watch, spelled, token));
        Ok(b"OK\0".to_vec())
    }

    pub(super) fn reset(&mut self, conn: u32) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.watches.clear();
            conn.transactions.clear();
            conn.events.clear();
        }
    }

    /// Fires the watches for the steps that lead from one tree to another. Each step fires the watches
    /// of the connections that may read the node at this step, as outside a transaction.
    pub(super) fn fire_changes(&mut self, steps: &[Step], old: &Tree, new: &Tree) {
        let mut done: Vec<&str> = Vec::new();
        for Step { path, .. } in steps {
            if done.contains(&path.as_str()) {
                continue;
            }
            done.push(path);
            for step in steps.iter().filter(|step| step.path == *path && step.removed) {
                self.fire_removed_below(path, &step.before, old, new);
            }
            if !old.contains_key(path) && !new.contains_key(path) {
                continue;
            }
            let lists: Vec<Vec<Entry>> = steps
                .iter()
                .filter(|step| step.path == *path)
                .flat_map(|step| [&step.before, &step.after])
                .flat_map(|tree| {
                    // The root is its own parent here: its list counts twice, to no effect.
                    [tree.get(path), tree.get(&parent(path))]
                })
                .flatten()
                .map(|node| node.perms.clone())
                .collect();
            let distance = |above: &str| {
                let depth = |p: &str| p.split('/').filter(|name| !name.is_empty()).count();
                if path == above {
                    Some(0)
                } else {
                    (!path.starts_with('@') && is_below(path, above))
                        .then(|| depth(path) - depth(above))
                }
            };
            self.fire(path, &lists, |watch| {
                distance(&watch.path)
                    .is_some_and(|far| watch.depth.is_none_or(|depth| depth >= far as u64))
            });
        }
    }

    fn fire_removed_below(&mut self, path: &str, before: &Tree, old: &Tree, new: &Tree) {
        for child in children(before, path) {
            self.fire_removed_below(&child, before, old, new);
            if new.contains_key(&child) || !old.contains_key(&child) {
                continue;
            }
            let lists = [&before[&child], &before[&parent(&child)]].map(|node| node.perms.clone());
            self.fire(&child, &lists, |watch| watch.path == child);
        }
    }

    /// Fires the watches of a special node for a domain.
    pub(super) fn fire_special(&mut self, name: &str, domid: u16) {
        let lists = [self.tree[name].perms.clone(), self.tree["/"].perms.clone()];
        let with_domid = format!("{name}/{domid}");
        let conns: Vec<u32> = self.conns.keys().copied().collect();
        for conn in conns {
            if !lists.iter().any(|perms| self.allowed(conn, perms, b'r')) {
                continue;
            }
            for watch in self.conns[&conn].watches.clone() {
                let bare = watch.depth.is_none_or(|depth| depth == 0);
                let path = match () {
                    () if watch.path == name && bare => name,
                    () if watch.path == name || watch.path == with_domid => &with_domid,
                    () => continue,
                };
                self.queue(conn, &watch, path);
            }
        }
    }

    fn fire(&mut self, path: &str, lists: &[Vec<Entry>], fires: impl Fn(&Watch) -> bool) {
        let conns: Vec<u32> = self.conns.keys().copied().collect();
        for conn in conns {
            if !lists.iter().any(|perms| self.allowed(conn, perms, b'r')) {
                continue;
            }
            for watch in self.conns[&conn].watches.clone() {
                if fires(&watch) {
                    self.queue(conn, &watch, path);
                }
            }
        }
    }

    fn queue(&mut self, conn: u32, watch: &Watch, path: &str) {
        let spelled = &path[watch.path.len() - watch.spelled.len()..];
        let event = (spelled.to_owned(), watch.token.clone());
        let conn = self.conns.get_mut(&conn).expect("open");
        // The watches of a connection have different tokens. Otherwise equal events of two watches
        // would be one.
        if !conn.events.contains(&event) {
            conn.events.push(event);
        }
    }
}

fn came_from(watch: &Watch, _path: &str, token: &[u8]) -> bool {
    watch.token == token
}
