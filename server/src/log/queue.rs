//! A bounded queue of lines, and the thread that writes them to files.
//!
//! The main thread never waits for a file: standard error may be a full pipe that no process reads. A
//! line for which the queue has no room is dropped and counted. The next line written is the count.
//!
//! This is not `tracing-appender`, whose queue counts dropped lines but does not report them, bounds the
//! lines but not their bytes, panics if its thread cannot be started, and needs a crate for dates.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

/// How much may be queued: lines, and their bytes in total.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) lines: usize,
    pub(crate) bytes: usize,
}

/// The shortest time between two reports of suppressed lines.
const REPORT: Duration = Duration::from_secs(1);

enum Message {
    Line(Arc<File>, Vec<u8>),
    /// Lines have been suppressed; reports them even if no other line follows.
    Look,
    /// Everything queued before this has been written.
    Flush(SyncSender<()>),
}

#[derive(Debug, Default)]
struct Counts {
    /// Bytes queued.
    bytes: AtomicUsize,
    /// Lines dropped for lack of room since the last report.
    dropped: AtomicU64,
    /// Lines over the rate limit since the last report.
    held_back: AtomicU64,
}

impl Counts {
    /// Returns true if lines are missing.
    fn is_missing_any(&self) -> bool {
        self.dropped.load(Ordering::Relaxed) > 0 || self.held_back.load(Ordering::Relaxed) > 0
    }
}

/// A queue of lines, each with its file. Clones share the queue.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    room: Room,
    sender: SyncSender<Message>,
    counts: Arc<Counts>,
}

impl Queue {
    /// A queue with a thread of this name.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub(crate) fn start(name: &str, room: Room) -> io::Result<Queue> {
        let (sender, receiver) = mpsc::sync_channel(room.lines);
        let queue = Queue { room, sender, counts: Arc::default() };
        let counts = queue.counts.clone();
        thread::Builder::new().name(name.into()).spawn(move || write_all(&receiver, &counts))?;
        Ok(queue)
    }

    /// Queues a line, or counts it as dropped if there is no room.
    pub(crate) fn push(&self, file: Arc<File>, line: Vec<u8>) {
        let len = line.len();
        let waiting = self.counts.bytes.fetch_add(len, Ordering::Relaxed);
        let is_full = waiting + len > self.room.bytes;
        if is_full || self.sender.try_send(Message::Line(file, line)).is_err() {
            self.counts.bytes.fetch_sub(len, Ordering::Relaxed);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a line over the rate limit. The count is reported later.
    pub(crate) fn hold_back(&self) {
        if self.counts.held_back.fetch_add(1, Ordering::Relaxed) == 0 {
            let _ = self.sender.try_send(Message::Look);
        }
    }

    /// Waits until all queued lines have been written, at most for `limit`. Returns true if they have
    /// been.
    pub(crate) fn flush(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let (done, is_done) = mpsc::sync_channel(1);
        let mut message = Message::Flush(done);
        // A standard channel has no send with a timeout.
        while let Err(error) = self.sender.try_send(message) {
            let (mpsc::TrySendError::Full(back) | mpsc::TrySendError::Disconnected(back)) = error;
            if Instant::now() >= end {
                return false;
            }
            message = back;
            thread::sleep(Duration::from_millis(1));
        }
        is_done.recv_timeout(end.saturating_duration_since(Instant::now())).is_ok()
    }
}

/// Writes queued lines, for ever.
fn write_all(receiver: &Receiver<Message>, counts: &Counts) {
    let mut last: Option<Arc<File>> = None;
    let mut reported = Instant::now();
    loop {
        let rest = || (reported + REPORT).saturating_duration_since(Instant::now());
        let message = match counts.is_missing_any() {
            true => receiver.recv_timeout(rest()),
            false => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match message {
            Ok(Message::Line(file, line)) => {
                counts.bytes.fetch_sub(line.len(), Ordering::Relaxed);
                write(&file, &line);
                last = Some(file);
            }
            Ok(Message::Flush(done)) => {
                report(counts, last.as_deref());
                let _ = done.send(());
            }
            Ok(Message::Look) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if counts.is_missing_any() && rest().is_zero() {
            report(counts, last.as_deref());
            reported = Instant::now();
        }
    }
}

/// Writes a line, and waits while the file has no room. On an error the line is lost; the next line is
/// tried again, since the file may have room or another reader by then.
fn write(mut file: &File, mut line: &[u8]) {
    while !line.is_empty() {
        match file.write(line) {
            Ok(count) => line = &line[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut wait = [PollFd::new(file, PollFlags::OUT)];
                if poll(&mut wait, None).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Reports how many lines are missing.
fn report(counts: &Counts, file: Option<&File>) {
    let Some(file) = file else { return };
    let dropped = counts.dropped.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        let line =
            format!("xenstored: {dropped} lines dropped: this log was not read fast enough\n");
        write(file, line.as_bytes());
    }
    let held_back = counts.held_back.swap(0, Ordering::Relaxed);
    if held_back > 0 {
        let line =
            format!("xenstored: suppressed {held_back} lines that clients and guests caused\n");
        write(file, line.as_bytes());
    }
}

/// A rate limit with a burst (token bucket).
#[derive(Debug)]
pub(crate) struct Bucket {
    burst: u32,
    /// Time in which one more line is allowed.
    each: Duration,
    /// When the bucket is full again. A full one allows `burst` lines.
    full: Mutex<Option<Instant>>,
}

impl Bucket {
    pub(crate) const fn new(burst: u32, each: Duration) -> Bucket {
        Bucket { burst, each, full: Mutex::new(None) }
    }

    /// Returns true, and counts the line, if one is allowed now.
    pub(crate) fn take(&self, now: Instant) -> bool {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        let from = full.map_or(now, |full| full.max(now));
        let is_allowed = from + self.each <= now + self.each * self.burst;
        if is_allowed {
            *full = Some(from + self.each);
        }
        is_allowed
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const ROOM: Room = Room { lines: 4096, bytes: 1 << 20 };

    /// A file that is a pipe, and its other end.
    fn pipe() -> (Arc<File>, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (Arc::new(File::from(std::os::fd::OwnedFd::from(writer))), reader)
    }

    // Fails if queuing a line waits for a full pipe, if memory grows meanwhile, or if the number of
    // missing lines is not reported later.
    #[test]
    fn a_pipe_that_is_not_read_costs_lines_and_says_so() {
        let (file, mut reader) = pipe();
        let queue = Queue::start("test", ROOM).unwrap();
        let line = [&[b'x'; 999][..], b"\n"].concat();
        let count = 10_000;
        for _ in 0..count {
            queue.push(file.clone(), line.clone());
        }
        assert!(queue.counts.bytes.load(Ordering::Relaxed) <= ROOM.bytes);
        assert!(!queue.flush(Duration::from_millis(10)));
        let dropped = queue.counts.dropped.load(Ordering::Relaxed);
        assert!(dropped > 0);
        let reading = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        assert!(queue.flush(Duration::from_secs(60)));
        drop((queue, file));
        let text = reading.join().unwrap();
        assert_eq!(text.matches("xxx\n").count() as u64, count - dropped);
        assert!(text.contains(&format!("xenstored: {dropped} lines dropped")), "{dropped}");
    }

    // Fails if suppressed lines are not reported, or are reported one by one.
    #[test]
    fn lines_that_are_held_back_are_counted() {
        let (file, mut reader) = pipe();
        let queue = Queue::start("test", ROOM).unwrap();
        queue.push(file.clone(), b"first\n".to_vec());
        (0..1000).for_each(|_| queue.hold_back());
        assert!(queue.flush(Duration::from_secs(60)));
        drop((queue, file));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("first\n") && text.contains("suppressed"), "{text}");
        let counts = text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok());
        assert_eq!(counts.sum::<u64>(), 1000, "{text}");
        assert!(text.lines().count() <= 3, "{text}");
    }

    // Fails if more than the burst goes through at once, or more than the rate after it, or less.
    #[test]
    fn a_rate_has_a_burst_and_a_limit() {
        let bucket = Bucket::new(5, Duration::from_millis(100));
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let allowed = |ms| (0..100).filter(|_| bucket.take(at(ms))).count();
        assert_eq!(allowed(0), 5);
        assert_eq!(allowed(50), 0);
        assert_eq!(allowed(100), 1);
        assert_eq!(allowed(400), 3);
        assert_eq!(allowed(60_000), 5);
    }
}
