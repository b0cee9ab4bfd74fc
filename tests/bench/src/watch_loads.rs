//! What watches cost: those that match, and those that do not.

use std::ops::Range;
use std::time::Instant;

use xenstore_tests::raw::op;

use crate::bars::Bar::{RateOfPeers, RateOfRow};
use crate::meter::{Meter, Result};
use crate::rows::{Case, Load, Stage, case, row};
use crate::wire::{Client, receive_all, word};

pub(crate) fn cases() -> Vec<Case> {
    let beside = |each| move |stage: &Stage| Writer::prepare(stage, each, 0..0, 0);
    vec![
        case(
            GROUP,
            [
                row(NONE, beside(0)),
                row("WRITE beside 10,000 watches that do not match", beside(100))
                    .bar(RateOfRow(0.9, NONE)),
                row("WRITE beside 100,000 watches that do not match", beside(1000))
                    .bar(RateOfRow(0.9, NONE)),
            ],
        ),
        case(
            GROUP,
            [row("WRITE that fires 1,000 watches on 100 connections", |stage| {
                Writer::prepare(stage, 0, 0..CONNECTIONS, 10)
            })
            .bar(RateOfPeers(4.0))],
        ),
        case(
            GROUP,
            [row("WRITE that fires 1 of 10,000 watches", |stage| {
                Writer::prepare(stage, 100, 50..51, 1)
            })],
        ),
    ]
}

const GROUP: &str = "Watches";
const NONE: &str = "WRITE beside no watch";
const CONNECTIONS: usize = 100;

/// WRITEs; an operation is over when its reply and all events are there.
struct Writer {
    client: Client,
    /// Connections with watches.
    watchers: Vec<Client>,
    /// Those of them that hear of the WRITE.
    hearing: Range<usize>,
    /// Events of one WRITE on one connection.
    events: Vec<u8>,
}

impl Writer {
    /// On each of the connections so many watches on other nodes, and on some of the connections so
    /// many on the one that is written.
    fn prepare(
        stage: &Stage,
        others: usize,
        hearing: Range<usize>,
        firing: usize,
    ) -> Result<Writer> {
        let client = stage.subject.connect_with_value()?;
        let mut watchers = Vec::new();
        let connections = if others + firing == 0 { 0 } else { CONNECTIONS };
        for at in 0..connections {
            let mut watcher = stage.connect()?;
            let other = |i| (op::WATCH, format!("/bench/other/{at}/{i}|token|"));
            watcher.bulk((0..others).map(other), 1, stage.deadline)?;
            if hearing.contains(&at) {
                let value = |i| (op::WATCH, format!("/bench/value|token-{i:02}|"));
                watcher.bulk((0..firing).map(value), 1, stage.deadline)?;
            }
            stage.deadline.check().map_err(|e| format!("{e} ({at} connections with watches)"))?;
            watchers.push(watcher);
        }
        Ok(Writer { client, watchers, hearing, events: vec![0; firing * EVENT] })
    }
}

/// Bytes of an event.
const EVENT: usize = 16 + "/bench/value|token-00|".len();

impl Load for Writer {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        meter.round(|tally, until| {
            let mut now = Instant::now();
            while now < until {
                self.client.ask(op::WRITE, 0, b"/bench/value\0some text")?;
                for watcher in &self.watchers[self.hearing.clone()] {
                    receive_all(&watcher.stream, &mut self.events)?;
                    if self.events.chunks(EVENT).any(|event| word(event, 0) != op::WATCH_EVENT) {
                        return Err("something else than an event came".into());
                    }
                }
                now = tally.done(now);
            }
            Ok(())
        })
    }
}
