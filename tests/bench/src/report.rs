//! The report on the terminal, and what it has in common with the page.

use std::process::Command;

use crate::measure::{Measured, Outcome};
use crate::meter::Figures;
use crate::subjects::Who;

/// One line a daemon, then its bars.
pub(crate) fn print(measured: &Measured) {
    println!("\n{}", measured.name);
    for outcome in &measured.outcomes {
        print!("  {:<6}", outcome.who.name());
        match &outcome.figures {
            Err(why) => println!("{why}"),
            Ok(figures) => {
                let cells = cells(figures, outcome);
                println!(
                    "{:>12} {:>11} {:>10} {:>9}  {:<12} {}",
                    cells.rate,
                    cells.cpu,
                    cells.p99,
                    cells.peak,
                    ratio(measured, outcome.who),
                    remarks(measured, outcome)
                );
            }
        }
    }
    for judged in &measured.judged {
        let value = judged.value.map_or("-".into(), number);
        println!("  {:<10} {}: {value}", judged.word(), judged.bar);
    }
}

/// The head of the table on the terminal.
pub(crate) fn print_head() {
    println!(
        "\n  {:<6}{:>12} {:>11} {:>10} {:>9}  {:<12}",
        "", "ops/s", "µs CPU/op", "p99 µs", "peak MiB", "ours : it"
    );
}

/// Figures as text.
pub(crate) struct Cells {
    pub(crate) rate: String,
    pub(crate) cpu: String,
    pub(crate) p99: String,
    pub(crate) peak: String,
}

pub(crate) fn cells(figures: &Figures, outcome: &Outcome) -> Cells {
    let text = |value: Option<f64>| value.map_or("-".into(), number);
    Cells {
        rate: text(figures.rate),
        cpu: text(figures.cpu),
        p99: text(figures.p99),
        peak: text(outcome.peak.map(|bytes| bytes / 1024.0 / 1024.0)),
    }
}

/// Two digits at least, with commas between thousands.
pub(crate) fn number(value: f64) -> String {
    let digits = match value {
        0.0 | 10.0.. => 0,
        1.0.. => 1,
        0.1.. => 2,
        0.01.. => 3,
        _ => 4,
    };
    let number = format!("{value:.digits$}");
    if value < 1000.0 {
        return number;
    }
    let mut text = String::new();
    for (at, digit) in number.chars().enumerate() {
        if at > 0 && (number.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Our operations per second, or where there is memory to compare its bytes, divided by the other's.
pub(crate) fn ratio_to(measured: &Measured, other: Who) -> Option<f64> {
    let (ours, other) = (measured.figures(Who::Ours)?, measured.figures(other)?);
    match measured.item {
        "node" => Some(ours.bytes_each? / other.bytes_each?),
        _ => Some(ours.rate? / other.rate?),
    }
}

fn ratio(measured: &Measured, other: Who) -> String {
    match ratio_to(measured, other) {
        Some(ratio) if other != Who::Ours => format!("{ratio:.2}"),
        _ => String::new(),
    }
}

/// Remarks on figures without a column.
pub(crate) fn remarks(measured: &Measured, outcome: &Outcome) -> String {
    let mut remarks = Vec::new();
    if let Ok(figures) = &outcome.figures {
        if let Some(bytes) = figures.bytes_each {
            remarks.push(format!("{} bytes/{}", number(bytes), measured.item));
        }
        if let Some(retries) = figures.retries.filter(|retries| *retries > 0.0) {
            remarks.push(format!("{} EAGAIN/s", number(retries)));
        }
    }
    if !outcome.note.is_empty() {
        remarks.push(outcome.note.clone());
    }
    remarks.join(", ")
}

/// How many bars were passed, missed, and not judged.
pub(crate) fn counts(all: &[Measured]) -> String {
    let judged = || all.iter().flat_map(|measured| &measured.judged);
    let count = |passed| judged().filter(|judged| judged.passed == passed).count();
    format!(
        "bars: {} passed, {} missed, {} not judged",
        count(Some(true)),
        count(Some(false)),
        count(None)
    )
}

/// Where this was measured, and what.
pub(crate) fn machine() -> Vec<(&'static str, String)> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let output = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (output.status.success() && !text.is_empty()).then_some(text)
    };
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".into());
    let release = read("/etc/os-release");
    let system = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let commit = output("git", &["describe", "--always", "--dirty"]);
    let peers = output("dpkg-query", &["-W", "-f", "${Version}", "xen-utils-4.17"]);
    vec![
        ("CPU", model.unwrap_or(": unknown").trim_start_matches(['\t', ' ', ':']).into()),
        ("cores", cores.to_string()),
        ("kernel", format!("Linux {}", read("/proc/sys/kernel/osrelease").trim())),
        ("system", system.unwrap_or("unknown").trim_matches('"').into()),
        ("ours", format!("{} at {}", env!("CARGO_PKG_VERSION"), or_unknown(commit))),
        ("C, O", format!("xenstored, oxenstored of xen-utils-4.17 {}", or_unknown(peers))),
        ("Rust", or_unknown(output("rustc", &["--version"]))),
    ]
}
