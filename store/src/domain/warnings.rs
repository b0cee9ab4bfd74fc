//! Warnings for the operator: counted refusals by quota, and lines for the log.
//!
//! A guest can cause any of them repeatedly. So each is logged once for its subject, or at intervals.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;

use xenstore_protocol::{DomId, Quota};

use crate::ids::Millis;

/// How long the same thing is not told again, in milliseconds; C xenstored's.
pub(crate) const PAUSE: Millis = 10_000;
/// Bytes of a path that are shown. One path is kept for each domain and quota, and is not charged.
const PATH_MAX: usize = 256;
/// Lines that wait to be fetched; more are dropped.
const LINES_MAX: usize = 64;

/// What a domain has been refused by one of its quotas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) count: u64,
    /// The limit, and the amount that was wanted, at the last time.
    pub(crate) limit: u32,
    pub(crate) wanted: i64,
    /// Where that was; empty if it was at no path. At most [`PATH_MAX`] bytes of it.
    pub(crate) path: String,
}

impl Refused {
    /// Where it was, to be appended to a line.
    pub(crate) fn at(&self) -> String {
        if self.path.is_empty() { String::new() } else { format!(" at {}", self.path) }
    }
}

/// Refusals, and lines for the log. Bounded by the number of domains.
#[derive(Clone, Debug, Default)]
pub(crate) struct Warnings {
    pub(crate) refused: BTreeMap<(DomId, Quota), Refused>,
    lines: VecDeque<String>,
    /// The time of the request that is being answered.
    pub(crate) now: Millis,
}

impl Warnings {
    /// A domain may not have as much of something as it wants. Told once until it is reset.
    pub(crate) fn refuse(
        &mut self,
        domid: DomId,
        quota: Quota,
        (limit, wanted): (u32, i64),
        path: Option<&str>,
    ) {
        let before = self.refused.get(&(domid, quota)).map_or(0, |refused| refused.count);
        let shown = path.unwrap_or_default();
        // Paths are ASCII.
        let shown = shown.get(..PATH_MAX).unwrap_or(shown);
        let refused = Refused { count: before + 1, limit, wanted, path: shown.into() };
        if before == 0 {
            let name = quota.name();
            self.push(format!(
                "domain {domid} has reached its quota {name}: limit {limit}, wanted {wanted}{}; \
                 CONTROL refusals counts, further ones are not logged",
                refused.at()
            ));
        }
        self.refused.insert((domid, quota), refused);
    }

    /// A domain is gone, or all are to be told again.
    pub(crate) fn forget(&mut self, domid: Option<DomId>) {
        self.refused.retain(|(of, _), _| domid.is_some_and(|domid| domid != *of));
    }

    pub(crate) fn push(&mut self, line: String) {
        if self.lines.len() < LINES_MAX {
            self.lines.push_back(line);
        }
    }

    /// The same, unless something of the kind was told a short while ago.
    pub(crate) fn push_throttled(
        &mut self,
        last: &mut Option<Millis>,
        line: impl FnOnce() -> String,
    ) {
        if last.is_none_or(|last| self.now.saturating_sub(last) >= PAUSE) {
            *last = Some(self.now);
            self.push(line());
        }
    }

    pub(crate) fn pop(&mut self) -> Option<String> {
        self.lines.pop_front()
    }
}
