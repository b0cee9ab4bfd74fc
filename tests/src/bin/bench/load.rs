//! What is asked of a daemon, and what it costs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use xenstore_tests::raw::{frame, op};

/// A load.
pub(crate) struct Load {
    pub(crate) name: &'static str,
    /// READ or WRITE.
    ty: u32,
    connections: usize,
    /// Requests under way on each.
    depth: usize,
    /// Connections that do nothing.
    idle: usize,
    /// 10,000 watches are there, of which each request fires one.
    pub(crate) watches: bool,
}

const fn load(
    name: &'static str,
    ty: u32,
    connections: usize,
    depth: usize,
    idle: usize,
    watches: bool,
) -> Load {
    Load { name, ty, connections, depth, idle, watches }
}

/// All loads.
pub(crate) const LOADS: &[Load] = &[
    load("READ, 1 connection, 1 in flight", op::READ, 1, 1, 0, false),
    load("WRITE, 1 connection, 1 in flight", op::WRITE, 1, 1, 0, false),
    load("READ, 1 connection, 32 in flight", op::READ, 1, 32, 0, false),
    load("READ, 16 connections", op::READ, 16, 1, 0, false),
    load("READ, 128 connections", op::READ, 128, 1, 0, false),
    load("WRITE, 128 connections", op::WRITE, 128, 1, 0, false),
    load("READ, 1 active beside 1,000 idle connections", op::READ, 1, 1, 1000, false),
    load("READ, 1 active beside 4,000 idle connections", op::READ, 1, 1, 4000, false),
    load("WRITE that fires 1 of 10,000 watches", op::WRITE, 1, 1, 0, true),
];

/// What came of it.
#[derive(Clone, Copy)]
pub(crate) struct Figures {
    /// Requests per second.
    pub(crate) rate: f64,
    /// Microseconds of the daemon's CPU time for each.
    pub(crate) cpu: f64,
}

/// The median of each.
pub(crate) fn median(mut figures: Vec<Figures>) -> Figures {
    let middle = figures.len() / 2;
    figures.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let rate = figures[middle].rate;
    figures.sort_by(|a, b| a.cpu.total_cmp(&b.cpu));
    Figures { rate, cpu: figures[middle].cpu }
}

/// Thousands of connections need as many descriptors.
pub(crate) fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// The daemon's CPU time in nanoseconds, of all its threads.
fn cpu(pid: u32) -> std::io::Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let time = text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        sum += time.unwrap_or(0);
    }
    Ok(sum)
}

/// Runs a load for a while.
pub(crate) fn run(
    load: &Load,
    socket: &Path,
    pid: u32,
    time: Duration,
) -> std::io::Result<Figures> {
    let connect = || UnixStream::connect(socket);
    let idle: Result<Vec<UnixStream>, _> = (0..load.idle).map(|_| connect()).collect();
    let idle = idle?;
    let mut watcher = load.watches.then(|| watch(connect()?)).transpose()?;
    let clients: Result<Vec<UnixStream>, _> = (0..load.connections).map(|_| connect()).collect();
    let mut clients = clients?;
    let mut buffer = vec![0; 256 * 1024];
    let payload: &[u8] =
        if load.ty == op::READ { b"/bench/value\0" } else { b"/bench/value\0some text" };
    answer_len(&mut clients[0], &frame(op::WRITE, 1, 0, b"/bench/value\0some text"), &mut buffer)?;
    let batch = frame(load.ty, 7, 0, payload).repeat(load.depth);
    let answer = answer_len(&mut clients[0], &frame(load.ty, 7, 0, payload), &mut buffer)?;
    let (before, start) = (cpu(pid)?, Instant::now());
    let mut count = 0_usize;
    while start.elapsed() < time {
        for client in &mut clients {
            client.write_all(&batch)?;
        }
        for client in &mut clients {
            let mut left = answer * load.depth;
            while left > 0 {
                let room = left.min(buffer.len());
                left -= client.read(&mut buffer[..room])?;
            }
        }
        count += load.connections * load.depth;
        if let Some(watcher) = &mut watcher {
            let _ = watcher.read(&mut buffer)?;
        }
    }
    let (seconds, spent) = (start.elapsed().as_secs_f64(), cpu(pid)? - before);
    drop(idle);
    Ok(Figures { rate: count as f64 / seconds, cpu: spent as f64 / 1000.0 / count as f64 })
}

fn answer_len(
    client: &mut UnixStream,
    request: &[u8],
    buffer: &mut [u8],
) -> std::io::Result<usize> {
    client.write_all(request)?;
    client.read_exact(&mut buffer[..16])?;
    let len = u32::from_le_bytes([buffer[12], buffer[13], buffer[14], buffer[15]]) as usize;
    client.read_exact(&mut buffer[..len])?;
    Ok(16 + len)
}

/// 10,000 watches, of which one is on the node that is written.
fn watch(mut client: UnixStream) -> std::io::Result<UnixStream> {
    let mut buffer = vec![0; 64 * 1024];
    for i in 0..10_000 {
        let path = if i == 5000 { "/bench/value".into() } else { format!("/bench/other/{i}") };
        client.write_all(&frame(op::WATCH, 1, 0, format!("{path}\0t\0").as_bytes()))?;
        let _ = client.read(&mut buffer)?;
    }
    // The last first events may still be under way.
    client.set_read_timeout(Some(Duration::from_millis(50)))?;
    while client.read(&mut buffer).is_ok_and(|count| count > 0) {}
    client.set_read_timeout(None)?;
    Ok(client)
}
