//! The report as a page, with plots.

use std::fmt::Write;
use std::path::Path;

use crate::measure::{Measured, Outcome};
use crate::meter::Result;
use crate::report::{cells, counts, number, ratio_to, remarks};
use crate::subjects::Who;

/// What the page says besides figures.
pub(crate) struct About {
    /// Names and versions, asked for before anything is written: a page changes what git says.
    pub(crate) machine: Vec<(&'static str, String)>,
    /// How it was measured.
    pub(crate) how: String,
    /// What measures it again.
    pub(crate) command: String,
}

/// Writes `results.md` and a plot for each group into a directory.
pub(crate) fn write(dir: &Path, all: &[Measured], about: &About) -> Result<()> {
    let About { machine, how, command } = about;
    std::fs::create_dir_all(dir)?;
    let mut page = String::from("# Results\n\nWritten by `");
    write!(
        page,
        "{command} --page`; [how to read it](README.md).\n\n{how}.\n\n| | |\n|---|---|\n"
    )?;
    for (what, value) in machine {
        writeln!(page, "| {what} | {value} |")?;
    }
    writeln!(
        page,
        "\nA row by itself: `{command} --only 'NAME'`, with its name as it stands here."
    )?;
    bars(&mut page, all)?;
    for group in all.chunk_by(|a, b| a.group == b.group) {
        let name = group[0].group;
        let plot = format!("{}.svg", name.to_lowercase().replace(' ', "-"));
        crate::plot::draw(&dir.join(&plot), group)?;
        write!(page, "\n## {name}\n\n![{name}: ratios]({plot})\n\n")?;
        table(&mut page, group)?;
    }
    std::fs::write(dir.join("results.md"), page)?;
    Ok(())
}

fn bars(page: &mut String, all: &[Measured]) -> Result<()> {
    write!(
        page,
        "\n## Bars\n\n{}\n\n| load | bar | came to | |\n|---|---|--:|---|\n",
        counts(all)
    )?;
    for measured in all {
        for judged in &measured.judged {
            let value = judged.value.map_or("-".into(), number);
            let (name, bar) = (&measured.name, &judged.bar);
            writeln!(page, "| {name} | {bar} | {value} | {} |", judged.word())?;
        }
    }
    Ok(())
}

fn table(page: &mut String, group: &[Measured]) -> Result<()> {
    page.push_str("| load | | ops/s | µs CPU/op | p99 µs | peak MiB | ours : it | |\n");
    page.push_str("|---|---|--:|--:|--:|--:|--:|---|\n");
    for measured in group {
        for (at, outcome) in measured.outcomes.iter().enumerate() {
            let name = if at == 0 { measured.name.as_str() } else { "" };
            writeln!(page, "| {name} | {} | {} |", outcome.who.name(), line(measured, outcome))?;
        }
    }
    Ok(())
}

fn line(measured: &Measured, outcome: &Outcome) -> String {
    let figures = match &outcome.figures {
        Err(why) => return format!("| | | | | {why}"),
        Ok(figures) => figures,
    };
    let cells = cells(figures, outcome);
    let ratio = match ratio_to(measured, outcome.who) {
        Some(ratio) if outcome.who != Who::Ours => format!("{ratio:.2}"),
        _ => String::new(),
    };
    let remarks = remarks(measured, outcome);
    [cells.rate, cells.cpu, cells.p99, cells.peak, ratio, remarks].join(" | ")
}
