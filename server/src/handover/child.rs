//! Programs that are run as probes. They end within a time limit, with all processes that they start.

use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, kill_process_group, pidfd_open,
    set_child_subreaper, waitpid,
};
use xenstore_transport::driver::Driver;

use super::error::ProgramError;

/// Bytes of each output that are stored. A write beyond fails with `EPERM`.
const OUTPUT_MAX: usize = 64 * 1024;
/// Maximum number of searches for processes that a program left behind: each that is killed may have
/// started another before.
const SWEEPS: usize = 100;

/// What a program has written, and how it has ended.
pub(super) struct ProgramOutput {
    pub(super) status: ExitStatus,
    pub(super) output: String,
    pub(super) errors: String,
}

/// Runs `work` on a separate thread, which no other work can delay.
///
/// # Errors
///
/// Fails if no thread can be started or if `work` panics.
pub(super) async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ProgramError> {
    let (done, result) = smol::channel::bounded(1);
    let run = move || drop(done.try_send(work()));
    let thread = thread::Builder::new().name("live-update".into()).spawn(run);
    thread.map_err(ProgramError::Thread)?;
    result.recv().await.map_err(|_| ProgramError::Panic)
}

/// Returns memory for one output. A pipe would have to be read meanwhile, and would stay open as long as
/// a process that the program has started.
fn capture() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = File::from(memfd_create("output", flags)?);
    memory.set_len(OUTPUT_MAX as u64)?;
    fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK)?;
    Ok(memory)
}

/// Returns the captured text up to the first NUL.
fn text(captured: &File) -> String {
    let mut bytes = vec![0; OUTPUT_MAX];
    let count = captured.read_at(&mut bytes, 0).unwrap_or(0);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(count);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Runs a program until it has ended, at most for `limit`. Processes that it has left behind are killed.
///
/// # Errors
///
/// Fails if it cannot be run or has not ended in time.
pub(super) fn run(mut command: Command, limit: Duration) -> Result<ProgramOutput, ProgramError> {
    let failed = ProgramError::Run;
    let (output, errors) = (capture().map_err(failed)?, capture().map_err(failed)?);
    command.stdout(output.try_clone().map_err(failed)?);
    command.stderr(errors.try_clone().map_err(failed)?);
    let others = children();
    // Orphans become children of this process, also those in another process group.
    set_child_subreaper(Some(getpid())).map_err(|error| failed(error.into()))?;
    let ended = spawn_and_wait(command.process_group(0), limit);
    sweep(&others);
    let _ = set_child_subreaper(None);
    let status = ended.map_err(failed)?;
    let status = status.ok_or(ProgramError::Timeout(limit))?;
    Ok(ProgramOutput { status, output: text(&output), errors: text(&errors) })
}

/// Returns `None` if the program had to be killed.
fn spawn_and_wait(command: &mut Command, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let mut child = command.spawn()?;
    let pid = Pid::from_child(&child);
    let in_time = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
    let in_time = in_time.and_then(|process| ends_within(&process, limit));
    // Before the wait, which frees its pid, and so the id of its process group.
    let _ = kill_process_group(pid, Signal::KILL);
    let status = child.wait()?;
    Ok(in_time?.then_some(status))
}

/// Waits until a process has ended. Returns false if that takes longer than `limit`.
pub(super) fn ends_within(process: &impl std::os::fd::AsFd, limit: Duration) -> io::Result<bool> {
    let deadline = std::time::Instant::now() + limit;
    loop {
        let rest = deadline.saturating_duration_since(std::time::Instant::now());
        let rest = Timespec::try_from(rest).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&rest)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns the children of a process, or nothing if the kernel does not list them.
pub(super) fn children_of(pid: &str) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids = |list: String| -> Vec<Pid> {
        let numbers = list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
        numbers.filter_map(Pid::from_raw).collect()
    };
    lists.flat_map(pids).collect()
}

/// Returns the children of this process.
pub(super) fn children() -> Vec<Pid> {
    children_of("self")
}

/// Waits for the children that the previous program has left to this process, e.g. its guard, to end.
pub(crate) async fn reap(driver: &Driver) {
    for pid in children() {
        let process = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        let Ok(process) = process.and_then(|process| driver.source(process)) else { return };
        let wait = |_: &OwnedFd| match waitpid(Some(pid), WaitOptions::NOHANG)? {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::WouldBlock.into()),
        };
        let _ = poll_fn(|cx| process.poll_read(cx, wait)).await;
    }
}

/// Kills all children except for `others`, and their children, until there are none.
fn sweep(others: &[Pid]) {
    for _ in 0..SWEEPS {
        let left: Vec<Pid> = children().into_iter().filter(|pid| !others.contains(pid)).collect();
        if left.is_empty() {
            return;
        }
        for pid in left {
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", text]);
        command
    }

    // Fails if a program that writes without end, hangs, or leaves processes behind, in its group or in
    // another session, takes memory or time without bound, or if one of them survives. (One test: the
    // children of a process are those of all its threads.)
    #[test]
    fn a_program_and_its_children_are_bounded_in_time_and_memory() {
        let limit = Duration::from_secs(20);
        let said = run(shell("echo out; echo err >&2; exit 3"), limit).unwrap();
        assert_eq!((&*said.output, &*said.errors), ("out\n", "err\n"));
        assert_eq!(said.status.code(), Some(3));
        let said = run(shell("exec head -c 100000000 /dev/zero | tr '\\0' x"), limit).unwrap();
        assert_eq!(said.output.len(), OUTPUT_MAX);
        let behind = "sleep 1000 & setsid sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000' & ";
        assert!(run(shell(behind), limit).unwrap().status.success());
        assert!(children().is_empty(), "{:?}", children());
        let late = run(shell(&format!("{behind} sleep 1000; true")), Duration::from_millis(300));
        assert!(matches!(late, Err(ProgramError::Timeout(_))));
        assert!(children().is_empty(), "{:?}", children());
        assert!(run(Command::new("/nonexistent"), limit).is_err());
    }
}
