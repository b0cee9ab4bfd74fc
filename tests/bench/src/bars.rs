//! What our daemon has to reach, as ratios of figures of one run.

use crate::meter::Figures;
use crate::subjects::Who;

/// A bar.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    /// The daemon's CPU time for each operation is at most so many times C's.
    CpuOfC(f64),
    /// Operations per second are at least so many times the echo server's.
    RateOfFloor(f64),
    /// The same, of our own daemon's without its journal.
    RateUnjournaled(f64),
    /// The same, of the better of C and O.
    RateOfPeers(f64),
    /// The same, of our own in another row.
    RateOfRow(f64, &'static str),
    /// The CPU time for each operation is at most so many times our own in another row.
    CpuOfRow(f64, &'static str),
    /// Time grows with the number of items: so many times more here than in another row, 20 % off
    /// at most.
    LinearFrom(f64, &'static str),
    /// The 99th percentile is at most so many times the better peer's.
    LatencyOfPeers(f64),
    /// The 99th percentile is at most so many milliseconds.
    LatencyAtMost(f64),
    /// No transaction had to be done again.
    NoRetries,
    /// Bytes for each item are at most so many times the better peer's.
    BytesOfPeers(f64),
}

/// What came of a bar.
pub(crate) struct Judged {
    /// The bar in words.
    pub(crate) bar: String,
    /// What it came to, if there is something to compare.
    pub(crate) value: Option<f64>,
    pub(crate) passed: Option<bool>,
}

impl Judged {
    pub(crate) fn word(&self) -> &'static str {
        match self.passed {
            Some(true) => "PASS",
            Some(false) => "MISS",
            None => "not judged",
        }
    }
}

impl Bar {
    /// The row that it compares with.
    pub(crate) fn base(&self) -> Option<&'static str> {
        match self {
            Bar::RateOfRow(_, row) | Bar::CpuOfRow(_, row) | Bar::LinearFrom(_, row) => Some(row),
            _ => None,
        }
    }

    /// Holds it against the figures of a row, and against those of our own daemon in its base.
    pub(crate) fn judge(
        &self,
        of: &dyn Fn(Who) -> Option<Figures>,
        base: Option<Figures>,
    ) -> Judged {
        let ours = of(Who::Ours);
        let get = |figures: Option<Figures>, what: fn(&Figures) -> Option<f64>| {
            figures.as_ref().and_then(what)
        };
        let peers = |what: fn(&Figures) -> Option<f64>| {
            [Who::C, Who::Ocaml].into_iter().filter_map(move |who| get(of(who), what))
        };
        let ratio =
            |what: fn(&Figures) -> Option<f64>, other: Option<f64>| Some(get(ours, what)? / other?);
        let least = |values: &mut dyn Iterator<Item = f64>| values.reduce(f64::min);
        let rate: fn(&Figures) -> Option<f64> = |f| f.rate;
        let cpu: fn(&Figures) -> Option<f64> = |f| f.cpu;
        let p99: fn(&Figures) -> Option<f64> = |f| f.p99;
        let bytes: fn(&Figures) -> Option<f64> = |f| f.bytes_each;
        let at_least = |limit: f64, words: String, value: Option<f64>| Judged {
            bar: words,
            value,
            passed: value.map(|value| value >= limit),
        };
        let at_most = |limit: f64, words: String, value: Option<f64>| Judged {
            bar: words,
            value,
            passed: value.map(|value| value <= limit),
        };
        match *self {
            Bar::CpuOfC(k) => {
                at_most(k, format!("CPU ≤ {k} × C's"), ratio(cpu, get(of(Who::C), cpu)))
            }
            Bar::RateOfFloor(k) => {
                let value = ratio(rate, get(of(Who::Floor), rate));
                at_least(k, format!("ops/s ≥ {k} × the floor's"), value)
            }
            Bar::RateUnjournaled(k) => {
                let value = ratio(rate, get(of(Who::Unjournaled), rate));
                at_least(k, format!("ops/s ≥ {k} × without a journal"), value)
            }
            Bar::RateOfPeers(k) => {
                let value = ratio(rate, peers(rate).reduce(f64::max));
                at_least(k, format!("ops/s ≥ {k} × the better peer's"), value)
            }
            Bar::RateOfRow(k, row) => {
                let value = ratio(rate, get(base, rate));
                at_least(k, format!("ops/s ≥ {k} × ours in \"{row}\""), value)
            }
            Bar::CpuOfRow(k, row) => {
                let value = ratio(cpu, get(base, cpu));
                at_most(k, format!("CPU ≤ {k} × ours in \"{row}\""), value)
            }
            Bar::LinearFrom(items, row) => {
                let value = ratio(rate, get(base, rate)).map(|ratio| ratio * items);
                let words = format!("time per item ≤ 1.25 × ours in \"{row}\"");
                at_most(1.25, words, value.map(|value| 1.0 / value))
            }
            Bar::LatencyOfPeers(k) => {
                let value = ratio(p99, least(&mut peers(p99)));
                at_most(k, format!("p99 ≤ {k} × the better peer's"), value)
            }
            Bar::LatencyAtMost(limit) => {
                at_most(limit, format!("p99 ≤ {limit} ms"), get(ours, p99).map(|us| us / 1000.0))
            }
            Bar::NoRetries => at_most(0.0, "no EAGAIN".into(), get(ours, |f| f.retries)),
            Bar::BytesOfPeers(k) => {
                let value = ratio(bytes, least(&mut peers(bytes)));
                at_most(k, format!("bytes ≤ {k} × the better peer's"), value)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rate: f64) -> Figures {
        Figures { rate: Some(rate), cpu: Some(rate), bytes_each: Some(rate), ..Figures::default() }
    }

    fn judge(bar: Bar, ours: f64, c: f64, ocaml: f64) -> Option<bool> {
        let of = |who| match who {
            Who::Ours => Some(figures(ours)),
            Who::C => Some(figures(c)),
            Who::Ocaml => Some(figures(ocaml)),
            Who::Floor | Who::Unjournaled => None,
        };
        bar.judge(&of, Some(figures(100.0))).passed
    }

    // Fails if more operations are taken for worse, or the worse peer for the better one.
    #[test]
    fn rates_are_to_be_high() {
        assert_eq!(judge(Bar::RateOfPeers(2.0), 200.0, 100.0, 50.0), Some(true));
        assert_eq!(judge(Bar::RateOfPeers(2.0), 199.0, 50.0, 100.0), Some(false));
        assert_eq!(judge(Bar::RateOfRow(0.9, ""), 90.0, 1.0, 1.0), Some(true));
        assert_eq!(judge(Bar::RateOfRow(0.9, ""), 89.0, 1.0, 1.0), Some(false));
    }

    // Fails if more CPU time or memory is taken for better.
    #[test]
    fn costs_are_to_be_low() {
        assert_eq!(judge(Bar::CpuOfC(0.5), 50.0, 100.0, 1.0), Some(true));
        assert_eq!(judge(Bar::CpuOfC(0.5), 51.0, 100.0, 1.0), Some(false));
        assert_eq!(judge(Bar::BytesOfPeers(1.0), 90.0, 100.0, 90.0), Some(true));
        assert_eq!(judge(Bar::BytesOfPeers(1.0), 91.0, 100.0, 90.0), Some(false));
    }

    // Fails if ten times the items may take more than ten times as long, and a quarter.
    #[test]
    fn linear_is_linear() {
        assert_eq!(judge(Bar::LinearFrom(10.0, ""), 10.0, 1.0, 1.0), Some(true));
        assert_eq!(judge(Bar::LinearFrom(10.0, ""), 8.0, 1.0, 1.0), Some(true));
        assert_eq!(judge(Bar::LinearFrom(10.0, ""), 7.9, 1.0, 1.0), Some(false));
    }

    // Fails if a bar is taken for passed when what it compares with is missing.
    #[test]
    fn nothing_is_judged_without_figures() {
        assert_eq!(judge(Bar::RateOfFloor(0.9), 1.0, 1.0, 1.0), None);
    }
}
