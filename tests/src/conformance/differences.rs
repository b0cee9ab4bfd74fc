//! The cases in which a daemon differs: its answer in each, and the reason.

use std::collections::BTreeMap;

use super::cases;

/// Start of a reason that applies to sockets only, and of one that applies to dom0's ring only.
const ON_A_SOCKET: &str = "on a socket: ";
const ON_A_RING: &str = "on a ring: ";

/// Maximal length of an observed answer, in characters.
const OBSERVED_MAX: usize = 120;

/// Start of the name of a case's node.
const NODE: &str = "conformance-";

/// A line of a list.
#[derive(Clone, Debug)]
struct Line {
    observed: String,
    reason: String,
}

/// The differences of a daemon, read from lines `case<TAB>observed answer<TAB>reason`. A case has
/// several lines if the answer over dom0's ring is another.
#[derive(Clone, Debug, Default)]
pub struct Differences(BTreeMap<String, Vec<Line>>);

impl Differences {
    /// Reads a list.
    ///
    /// # Errors
    ///
    /// Fails if a line does not have three parts, or names no case.
    pub fn parse(text: &str) -> Result<Differences, String> {
        let mut list = Differences::default();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let parts: Vec<&str> = line.split('\t').collect();
            let [name, observed, reason] = parts[..] else {
                return Err(format!("{line}: not a case, an answer and a reason between tabs"));
            };
            if !cases().any(|case| case.name == name) {
                return Err(format!("{name}: no such case"));
            }
            let line = Line { observed: observed.into(), reason: reason.into() };
            list.0.entry(name.into()).or_default().push(line);
        }
        Ok(list)
    }

    /// The lines of a case that apply to a ring, or to a socket.
    fn about(&self, case: &str, over_ring: bool) -> impl Iterator<Item = &Line> {
        let other = if over_ring { ON_A_SOCKET } else { ON_A_RING };
        let lines = self.0.get(case).into_iter().flatten();
        lines.filter(move |line| !line.reason.starts_with(other))
    }

    /// Returns true if the case is listed.
    pub(super) fn lists(&self, case: &str, over_ring: bool) -> bool {
        self.about(case, over_ring).next().is_some()
    }

    /// Returns true if the case is listed with this answer.
    pub(super) fn pins(&self, case: &str, over_ring: bool, answer: &str) -> bool {
        self.about(case, over_ring).any(|line| line.observed == answer)
    }

    /// The line that lists a case with this answer, and the reason that the list states for the case.
    pub fn line(&self, case: &str, answer: &str) -> String {
        let known = self.0.get(case).and_then(|lines| lines.first());
        let reason = known.map_or("REASON", |line| &line.reason);
        format!("{case}\t{}\t{reason}", observed(answer))
    }
}

/// An answer without the parts that differ in each run: its first line, at most `OBSERVED_MAX`
/// characters. `BASE` replaces the node of the case, `N` a number of three digits or more, and `x…`
/// four or more equal characters or pairs of characters.
pub fn observed(answer: &str) -> String {
    let line = answer.lines().next().unwrap_or_default();
    let text = short_repeats(&plain_numbers(line));
    match text.char_indices().nth(OBSERVED_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn plain_numbers(mut line: &str) -> String {
    let mut text = String::new();
    while let Some(char) = line.chars().next() {
        let digits = line.len() - line.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        if let Some(rest) = line.strip_prefix(NODE) {
            text += "BASE";
            line = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
        } else if digits >= 3 {
            text.push('N');
            line = &line[digits..];
        } else {
            text.push(if char == '\t' { ' ' } else { char });
            line = &line[char.len_utf8()..];
        }
    }
    text
}

fn short_repeats(line: &str) -> String {
    let chars: Vec<char> = line.chars().collect();
    let (mut text, mut at) = (String::new(), 0);
    while at < chars.len() {
        // The number of characters that equal the one `unit` before.
        let repeated = |unit: usize| {
            let rest = chars.iter().skip(at + unit);
            rest.zip(&chars[at..]).take_while(|(one, other)| one == other).count()
        };
        if let Some(unit) = [1, 2].into_iter().find(|unit| repeated(*unit) >= 3 * unit) {
            text.extend(&chars[at..at + unit]);
            text.push('…');
            at += unit + repeated(unit);
        } else {
            text.push(chars[at]);
            at += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the same answers of two runs differ, or different answers are equal.
    #[test]
    fn observed_answer_is_the_same_in_every_run() {
        let first = r#"type 2 /conformance-17-35/a|: got Ok("n0|r143|"), expected "v""#;
        let second = r#"type 2 /conformance-9117-3/a|: got Ok("n0|r99999|"), expected "v""#;
        assert_eq!(observed(first), r#"type 2 /BASE/a|: got Ok("n0|rN|"), expected "v""#);
        assert_eq!(observed(first), observed(second));
        assert_ne!(observed(first), observed(&first.replace("n0", "n1")));
        assert_eq!(observed("/xxxxxxxx|\nmore"), "/x…|");
        assert_eq!(observed("type 11 /d/d/d/d/d/: x"), observed("type 11 /d/d/d/d: x"));
        assert_eq!(observed(&"abc".repeat(100)).chars().count(), OBSERVED_MAX + 1);
    }

    // Fails if an answer that is not listed is accepted, or a line for one transport applies to the
    // other.
    #[test]
    fn listed_difference_accepts_only_its_answer() {
        let list = "rm/the-root-is-einval\tgot OK\ton a socket: its own way\n\
                    mkdir/needs-write-access\tgot A\tmay\nmkdir/needs-write-access\tgot B\ton a ring: may\n";
        let list = Differences::parse(list).unwrap();
        assert!(list.pins("rm/the-root-is-einval", false, "got OK"));
        assert!(!list.pins("rm/the-root-is-einval", false, "no such socket"));
        assert!(!list.lists("rm/the-root-is-einval", true));
        assert!(list.pins("mkdir/needs-write-access", true, "got B"));
        assert!(!list.pins("mkdir/needs-write-access", false, "got B"));
        assert!(Differences::parse("mkdir/needs-write-access\tmay").is_err());
        assert!(Differences::parse("mkdir/nonsense\tgot A\tmay").is_err());
    }
}
