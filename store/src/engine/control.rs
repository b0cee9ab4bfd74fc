//! CONTROL: commands to the server, with the names and forms of C xenstored, and inspectors.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use xenstore_protocol::{Control, DomId, Errno, PAYLOAD_MAX, Quota, Reply, decimal};

use crate::domain::host::Host;
use crate::domain::registry::{Largest, Usage};
use crate::engine::Engine;
use crate::ids::{Caller, ConnId, Millis};

/// Commands that are answered here, with their arguments.
const COMMANDS: &[(&str, &str)] = &[
    ("check", ""),
    ("conflicts", ""),
    ("connections", ""),
    ("help", ""),
    ("quota", "[set <name> <val>|<domid>|max [-r]]"),
    ("quota-soft", "[set <name> <val>]"),
    ("refusals", "[-r]"),
    ("transactions", ""),
    ("watches", ""),
];

impl Engine {
    pub(crate) fn control(
        &mut self,
        control: &Control<'_>,
        now: Millis,
        host: &mut dyn Host,
    ) -> Result<Reply<'static>, Errno> {
        let args: Vec<&[u8]> = control.args().collect();
        let text = match (control.command(), args.as_slice()) {
            (b"check", []) => {
                self.check().map_err(|_| Errno::Eio)?;
                return Ok(Reply::Ok);
            }
            (b"help", []) => help(host),
            (b"quota", []) => self.quota_settings(false),
            (b"quota-soft", []) => self.quota_settings(true),
            (b"quota", [b"set", name, value]) => return self.quota_set("", name, value),
            (b"quota-soft", [b"set", name, value]) => return self.quota_set("soft-", name, value),
            (b"quota", [b"max"]) => self.quota_max(),
            (b"quota", [b"max", b"-r"]) => {
                let text = self.quota_max();
                for domain in self.domains.known.values_mut() {
                    (domain.peak, domain.largest) = (domain.usage, Largest::default());
                }
                text
            }
            (b"quota", [domid]) => self.quota_of(domid)?,
            (b"refusals", []) => self.show_refusals(),
            (b"refusals", [b"-r"]) => {
                let text = self.show_refusals();
                self.domains.warnings.forget(None);
                text
            }
            (b"watches", []) => self.show_watches(),
            (b"transactions", []) => self.show_transactions(now),
            (b"connections", []) => {
                // The host has the failed connections.
                let failed = host.control(b"connections", &[]).and_then(Result::ok);
                let failed = String::from_utf8(failed.unwrap_or_default()).unwrap_or_default();
                self.show_connections() + &failed
            }
            (b"conflicts", []) => self.show_conflicts(now),
            (command, _) if COMMANDS.iter().any(|(name, _)| name.as_bytes() == command) => {
                return Err(Errno::Einval);
            }
            (command, args) => {
                return match host.control(command, args) {
                    Some(output) => Ok(Reply::Bytes(Cow::Owned(output?))),
                    None => Err(Errno::Einval),
                };
            }
        };
        Ok(Reply::Bytes(Cow::Owned(fitting(text))))
    }

    fn quota_settings(&self, soft: bool) -> String {
        let title = if soft { "Soft quota settings:\n" } else { "Quota settings:\n" };
        let quotas = Quota::ALL.iter().filter(|quota| is_soft(**quota) == soft);
        quotas.fold(title.into(), |text, quota| {
            let name = quota.name().trim_start_matches("soft-");
            let limit = self.domains.defaults.get(*quota);
            text + &format!("{name:<17}: {limit:>8} {}\n", quota.meaning())
        })
    }

    fn quota_set(
        &mut self,
        prefix: &str,
        name: &[u8],
        value: &[u8],
    ) -> Result<Reply<'static>, Errno> {
        let quota = Quota::parse(&[prefix.as_bytes(), name].concat())
            .filter(|quota| is_soft(*quota) != prefix.is_empty())
            .ok_or(Errno::Einval)?;
        let value = decimal(value).ok_or(Errno::Einval)?;
        self.domains.defaults.set(quota, value);
        self.epoch += 1;
        Ok(Reply::Ok)
    }

    fn quota_of(&self, domid: &[u8]) -> Result<String, Errno> {
        let domid = DomId(decimal(domid).ok_or(Errno::Einval)?);
        let domain = self.domains.get(domid).ok_or(Errno::Enoent)?;
        let rows = Quota::ALL.iter().filter(|quota| !is_soft(**quota));
        Ok(rows.fold(format!("Domain {domid}:\n"), |text, quota| {
            // As with C xenstored, one of a single thing has nothing that it sums up.
            let now = domain.usage.of(*quota).unwrap_or(0);
            let max = domain.peak.of(*quota).unwrap_or(domain.largest.of(*quota));
            text + &format!("{:<17}: {now:>8} (max {max:>8})\n", quota.name())
        }))
    }

    fn quota_max(&self) -> String {
        let privileged = self.config.privileged;
        let domains = || self.domains.known.iter().filter(|(domid, _)| **domid != privileged);
        let peak = domains().fold(Usage::default(), |max, (_, domain)| max.max(domain.peak));
        let largest =
            domains().fold(Largest::default(), |max, (_, domain)| max.max(domain.largest));
        let rows = Quota::ALL.iter().filter(|quota| !is_soft(**quota));
        rows.fold("Max. seen accounting values:\n".into(), |text, quota| {
            let max = peak.of(*quota).unwrap_or(largest.of(*quota));
            text + &format!("{:<17}: {max:>8}\n", quota.name())
        })
    }

    fn show_refusals(&self) -> String {
        let refused = &self.domains.warnings.refused;
        refused.iter().fold(String::new(), |text, ((domid, quota), refused)| {
            let (count, limit, wanted) = (refused.count, refused.limit, refused.wanted);
            let (name, at) = (quota.name(), refused.at());
            text + &format!(
                "domain {domid} {name} count {count} limit {limit} wanted {wanted}{at}\n"
            )
        })
    }

    fn show_watches(&self) -> String {
        self.watches.all.values().fold(String::new(), |text, watch| {
            let token = watch.token.escape_ascii();
            let depth = watch.depth.map_or("-".into(), |depth| format!("{depth}"));
            let (conn, path, waiting) = (watch.conn, &watch.path, watch.pending.len());
            text + &format!("conn {conn} {path} {token} depth {depth} events {waiting}\n")
        })
    }

    fn show_transactions(&self, now: Millis) -> String {
        let mut text = String::new();
        for (conn, connection) in self.conns.iter() {
            for (id, transaction) in &connection.transactions {
                let age = now.saturating_sub(transaction.since) / 1000;
                let requests = transaction.requests();
                let changes = if transaction.has_changes() { "yes" } else { "no" };
                text += &format!(
                    "conn {conn} transaction {id} age {age} s requests {requests} changes {changes}"
                );
                if let Some(end) = self.fairness.end_of(*conn, *id) {
                    text += &format!(" protected for {} ms", end.saturating_sub(now));
                }
                text.push('\n');
            }
        }
        text
    }

    fn show_conflicts(&self, now: Millis) -> String {
        let (count, fairness) = (self.conflicts.conflict_count, &self.fairness);
        let (protected, held) = (fairness.protected_count, fairness.held_count);
        let mut title = format!("{count} so far, the last first\n");
        if protected > 0 {
            title += &format!("{protected} transactions protected, {held} requests deferred\n");
        }
        self.conflicts.conflicts().fold(title, |text, c| {
            let age = now.saturating_sub(c.at) / 1000;
            let by = c.by.map_or("unknown".into(), |by| self.who(by));
            text + &format!("{age} s ago {} at {} because of {by}\n", self.who(c.conn), c.path)
        })
    }

    /// Logs a transaction that has failed; not each, which anybody can cause. CONTROL `conflicts`
    /// shows more of them.
    pub(crate) fn tell_conflict(&mut self, conn: ConnId, path: &str, by: Option<ConnId>) {
        let by = by.map_or("unknown".into(), |by| self.who(by));
        let line = format!("a transaction of {} failed at {path} because of {by}", self.who(conn));
        self.domains.warnings.push_throttled(&mut self.conflicts.told, || line);
    }

    /// A connection, by its number and whose it is; it may have ended.
    pub(crate) fn who(&self, conn: ConnId) -> String {
        match self.conns.get(&conn).map(|connection| connection.caller) {
            Some(Caller::Socket) => format!("conn {conn} socket"),
            Some(Caller::Domain(domid)) => format!("conn {conn} domain {domid}"),
            None => format!("conn {conn} ended"),
        }
    }

    fn show_connections(&self) -> String {
        self.conns.iter().fold(String::new(), |text, (conn, connection)| {
            let who = self.who(*conn);
            let (watches, transactions) = (connection.watches.len(), connection.transactions.len());
            let events = connection.waiting();
            let waits = if self.fairness.is_held(*conn) { " waits" } else { "" };
            text + &format!(
                "{who} watches {watches} transactions {transactions} events {events}{waits}\n"
            )
        })
    }
}

fn is_soft(quota: Quota) -> bool {
    quota == Quota::SoftMemory
}

fn help(host: &dyn Host) -> String {
    let mut commands: Vec<(&str, &str)> = [COMMANDS, host.control_commands()].concat();
    commands.sort_unstable();
    commands.iter().fold(String::new(), |text, (name, args)| text + &format!("{name:<15} {args}\n"))
}

/// As many whole lines as fit a reply with its NUL; a last line says how many are missing.
fn fitting(text: String) -> Vec<u8> {
    let mut out = text.into_bytes();
    if out.len() >= PAYLOAD_MAX {
        let room = PAYLOAD_MAX - 40;
        let end = out[..room].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let missing = out[end..].iter().filter(|b| **b == b'\n').count();
        out.truncate(end);
        out.extend_from_slice(format!("... {missing} more\n").as_bytes());
    }
    out.push(0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a long listing is cut inside a line, exceeds a message, or hides that it was cut.
    #[test]
    fn long_listings_are_cut_at_a_line_and_say_so() {
        let text: String = (0..1000).map(|i| format!("line {i}\n")).collect();
        let out = fitting(text);
        assert!(out.len() <= PAYLOAD_MAX && out.ends_with(b" more\n\0"));
        let lines: Vec<&[u8]> = out.split(|b| *b == b'\n').collect();
        let missing = format!("... {} more", 1000 - (lines.len() - 2));
        assert_eq!(lines[lines.len() - 2], missing.as_bytes());
    }
}
