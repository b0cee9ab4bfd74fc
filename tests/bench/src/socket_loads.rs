//! READs and WRITEs over sockets: few and many connections, idle ones, greedy ones, short ones.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use xenstore_tests::raw::{bytes, frame, op};

use crate::bars::Bar::{CpuOfC, LatencyOfPeers, RateOfFloor, RateOfRow};
use crate::drive::{Driver, Repeat};
use crate::holder::Holder;
use crate::meter::{Meter, Result, Tally};
use crate::rows::{Case, Load, Row, Stage, case, row};
use crate::wire::{Client, connect, receive_all, word};

pub(crate) fn cases() -> Vec<Case> {
    let read = |connections| move |stage: &Stage| many(stage, op::READ, connections);
    let write = |connections| move |stage: &Stage| many(stage, op::WRITE, connections);
    let beside = |idle| move |stage: &Stage| Batch::prepare(stage, op::READ, 1, idle);
    let idle = |name: &str, count| row(name, beside(count)).floor().bar(RateOfRow(0.9, NONE_IDLE));
    vec![
        case(
            GROUP,
            [
                single("READ, 1 in flight", op::READ, 1).bar(CpuOfC(0.8)).bar(RateOfFloor(0.9)),
                single("WRITE, 1 in flight", op::WRITE, 1).bar(CpuOfC(0.8)).bar(RateOfFloor(0.9)),
                single("READ, 32 in flight", op::READ, 32).bar(CpuOfC(0.2)),
            ],
        ),
        case(
            GROUP,
            [
                row("READ, 16 connections", read(16)).floor(),
                row("READ, 128 connections", read(128))
                    .floor()
                    .bar(CpuOfC(0.6))
                    .bar(RateOfFloor(0.7)),
                row("WRITE, 16 connections", write(16)).floor(),
                row("WRITE, 128 connections", write(128)).floor(),
            ],
        ),
        case(
            GROUP,
            [
                row(NONE_IDLE, beside(0)).floor(),
                idle("READ, 1 active beside 1,000 idle connections", 1000),
                idle("READ, 1 active beside 4,000 idle connections", 4000),
                idle("READ, 1 active beside 15,000 idle connections", 15_000),
            ],
        ),
        case(
            GROUP,
            [row("quiet READs beside 64 connections with 64 in flight", Quiet::prepare)
                .floor()
                .bar(LatencyOfPeers(0.2))],
        ),
        case(GROUP, [row("connect, READ, close", Short::prepare).floor()]),
        case(
            "Journal",
            [
                single("WRITE, 1 in flight, with a journal", op::WRITE, 1).journal(),
                single("WRITE, 32 in flight, with a journal", op::WRITE, 32).journal(),
                row("WRITE, 128 connections, with a journal", write(128)).journal(),
            ],
        ),
        case(
            "Journal",
            [row("WRITE, 128 connections, on a separate core, with a journal", write(128))
                .journal()],
        )
        .split(),
    ]
}

const GROUP: &str = "Sockets";
const NONE_IDLE: &str = "READ, 1 active beside no idle connection";

fn single(name: &str, ty: u32, depth: usize) -> Row {
    row(name, move |stage| Batch::prepare(stage, ty, depth, 0)).floor()
}

/// A READ or WRITE of `/bench/value`.
fn request(ty: u32) -> Vec<u8> {
    let payload = if ty == op::READ { "/bench/value|" } else { "/bench/value|some text" };
    frame(ty, 7, 0, &bytes(payload))
}

/// How a request is answered, to the byte.
fn answer(client: &mut Client, ty: u32, request: &[u8]) -> Result<Vec<u8>> {
    client.stream.write_all(request)?;
    let mut header = [0; 16];
    receive_all(&client.stream, &mut header)?;
    if word(&header, 0) != ty {
        return Err(format!("request of type {ty}: got {}", word(&header, 0)).into());
    }
    let mut answer = header.to_vec();
    answer.resize(16 + word(&header, 12) as usize, 0);
    receive_all(&client.stream, &mut answer[16..])?;
    Ok(answer)
}

/// One connection that sends some requests at once, and the next when all are answered.
struct Batch {
    stream: UnixStream,
    requests: Vec<u8>,
    answers: Vec<u8>,
    depth: usize,
    _idle: Option<Holder>,
}

impl Batch {
    fn prepare(stage: &Stage, ty: u32, depth: usize, idle: usize) -> Result<Batch> {
        let holder = |count| Holder::start(&stage.socket(), count, stage.deadline);
        let idle = (idle > 0).then(|| holder(idle)).transpose()?;
        let mut client = stage.subject.connect_with_value()?;
        let request = request(ty);
        let answers = answer(&mut client, ty, &request)?.repeat(depth);
        let requests = request.repeat(depth);
        Ok(Batch { stream: client.stream, requests, answers, depth, _idle: idle })
    }
}

impl Load for Batch {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let mut buffer = vec![0; self.answers.len()];
        meter.round(|tally, until| {
            let mut now = Instant::now();
            while now < until {
                self.stream.write_all(&self.requests)?;
                receive_all(&self.stream, &mut buffer)?;
                if buffer != self.answers {
                    return Err("a request was answered in another way than before".into());
                }
                now = match self.depth {
                    1 => tally.done(now),
                    many => {
                        tally.ops += many;
                        Instant::now()
                    }
                };
            }
            Ok(())
        })
    }
}

/// Connections with one request in flight each.
fn many(stage: &Stage, ty: u32, connections: usize) -> Result<Driver<UnixStream, Repeat>> {
    stage.subject.connect_with_value()?;
    repeat(stage.socket(), ty, connections, 1)
}

fn repeat(
    socket: PathBuf,
    ty: u32,
    connections: usize,
    depth: usize,
) -> Result<Driver<UnixStream, Repeat>> {
    let one = |_| Ok((connect(&socket)?, Repeat { ty, frame: request(ty) }));
    Driver::new((0..connections).map(one).collect::<Result<_>>()?, depth)
}

/// A connection with one request in flight, beside others that do all they can.
struct Quiet {
    socket: PathBuf,
    quiet: Batch,
}

impl Quiet {
    fn prepare(stage: &Stage) -> Result<Quiet> {
        Ok(Quiet { socket: stage.socket(), quiet: Batch::prepare(stage, op::READ, 1, 0)? })
    }
}

impl Load for Quiet {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let (stop, socket) = (AtomicBool::new(false), self.socket.clone());
        std::thread::scope(|scope| {
            let greedy = scope.spawn(|| {
                // Errors of other threads are not of a kind that can be handed over.
                let drive = || -> Result<()> {
                    let mut others = repeat(socket, op::READ, 64, 64)?;
                    others.drive(&mut Tally::default(), || !stop.load(Ordering::Relaxed))?;
                    others.rest()
                };
                drive().map_err(|error| error.to_string())
            });
            let quiet = self.quiet.round(meter);
            meter.note = "CPU with what the others cost".into();
            stop.store(true, Ordering::Relaxed);
            let greedy = greedy.join().map_err(|_| "the greedy clients have panicked")?;
            quiet.and(greedy.map_err(Into::into))
        })
    }
}

/// A new connection for each request.
struct Short {
    socket: PathBuf,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Short {
    fn prepare(stage: &Stage) -> Result<Short> {
        let mut client = stage.subject.connect_with_value()?;
        let request = request(op::READ);
        let answer = answer(&mut client, op::READ, &request)?;
        Ok(Short { socket: stage.socket(), request, answer })
    }
}

impl Load for Short {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let mut buffer = vec![0; self.answer.len()];
        meter.round(|tally, until| {
            let mut now = Instant::now();
            while now < until {
                let mut stream = UnixStream::connect(&self.socket)?;
                stream.write_all(&self.request)?;
                receive_all(&stream, &mut buffer)?;
                drop(stream);
                now = tally.done(now);
            }
            Ok(())
        })
    }
}
