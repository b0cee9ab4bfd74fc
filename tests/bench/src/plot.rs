//! Ratios as bars, on a logarithmic scale.
#![allow(clippy::cast_possible_truncation)] // to pixels and powers of ten

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::measure::Measured;
use crate::meter::Result;
use crate::report::ratio_to;
use crate::subjects::Who;

const WIDTH: u32 = 960;
/// Of the names at the left.
const NAMES: i32 = 440;
const HEAD: i32 = 60;
const BAR: i32 = 12;
const GAP: i32 = 10;

const OTHERS: [(Who, RGBColor); 3] = [
    (Who::C, RGBColor(0x3b, 0x6e, 0xa5)),
    (Who::Ocaml, RGBColor(0xd9, 0x8e, 0x2b)),
    (Who::Floor, RGBColor(0x8a, 0x8a, 0x8a)),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// For each row, ours divided by each other that has figures.
pub(crate) fn draw(path: &Path, group: &[Measured]) -> Result<()> {
    let rows: Vec<(&Measured, Vec<(f64, RGBColor)>)> = group
        .iter()
        .map(|row| {
            let bar = |(who, colour)| Some((ratio_to(row, who)?, colour));
            (row, OTHERS.into_iter().filter_map(bar).collect())
        })
        .filter(|(_, bars): &(_, Vec<_>)| !bars.is_empty())
        .collect();
    let height = |bars: usize| i32::try_from(bars).map(|bars| bars * BAR + GAP);
    let total: i32 =
        rows.iter().map(|(_, bars)| height(bars.len())).sum::<std::result::Result<_, _>>()?;
    let size = (WIDTH, u32::try_from(HEAD + total + GAP)?);
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE)?;
    let scale = Scale::of(rows.iter().flat_map(|(_, bars)| bars).map(|(ratio, _)| *ratio));
    scale.draw(&area, HEAD + total)?;
    let memory = rows.iter().all(|(row, _)| row.item == "node");
    legend(&area, if memory { "our bytes" } else { "our operations per second" })?;
    let names = style(13).pos(Pos::new(HPos::Right, VPos::Center));
    let values = style(11).pos(Pos::new(HPos::Left, VPos::Center));
    let mut y = HEAD + GAP / 2;
    for (row, bars) in rows {
        let middle = y + (height(bars.len())? - GAP) / 2;
        area.draw(&Text::new(row.name.as_str(), (NAMES - 8, middle), names.clone()))?;
        for (ratio, colour) in bars {
            let (one, x) = (scale.x(1.0), scale.x(ratio));
            let corners = [(one.min(x), y), (one.max(x), y + BAR - 2)];
            area.draw(&Rectangle::new(corners, colour.filled()))?;
            let text = (one.max(x) + 4, y + BAR / 2 - 1);
            area.draw(&Text::new(format!("{ratio:.2}"), text, values.clone()))?;
            y += BAR;
        }
        y += GAP;
    }
    area.present()?;
    Ok(())
}

fn style(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&BLACK)
}

fn legend(area: &Area, ours: &str) -> Result<()> {
    let style = style(13).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw(&Text::new(format!("{ours}, divided by those of"), (10, 16), style.clone()))?;
    for (x, (who, colour)) in (300..).step_by(80).zip(OTHERS) {
        area.draw(&Rectangle::new([(x, 10), (x + 12, 22)], colour.filled()))?;
        area.draw(&Text::new(who.name(), (x + 18, 16), style.clone()))?;
    }
    Ok(())
}

/// Powers of ten, with 1 always among them.
struct Scale {
    from: f64,
    to: f64,
}

impl Scale {
    fn of(ratios: impl Iterator<Item = f64>) -> Scale {
        let (mut from, mut to) = (-1.0_f64, 1.0_f64);
        for log in ratios.filter(|ratio| *ratio > 0.0).map(f64::log10) {
            (from, to) = (from.min(log.floor()), to.max(log.ceil()));
        }
        Scale { from, to }
    }

    fn x(&self, ratio: f64) -> i32 {
        let share = (ratio.log10().max(self.from) - self.from) / (self.to - self.from);
        // Room for the value behind the longest bar.
        NAMES + (share * f64::from(WIDTH.cast_signed() - NAMES - 60)).round() as i32
    }

    fn draw(&self, area: &Area, bottom: i32) -> Result<()> {
        let style = style(11).pos(Pos::new(HPos::Center, VPos::Bottom));
        for power in self.from as i32..=self.to as i32 {
            let ratio = 10_f64.powi(power);
            let (x, colour) =
                (self.x(ratio), if power == 0 { &BLACK } else { &RGBColor(0xdd, 0xdd, 0xdd) });
            area.draw(&PathElement::new([(x, HEAD - 6), (x, bottom)], colour))?;
            area.draw(&Text::new(format!("{ratio}"), (x, HEAD - 8), style.clone()))?;
        }
        Ok(())
    }
}
