//! What remains after many rounds, and what the daemon stores for a guest that does not read.

use std::fs;

use xenstore_tests::fake_guest::{PORT, word};
use xenstore_tests::raw::{Link, frame, op};

use crate::Host;

/// Resources of a daemon.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    /// Bound ports, from the table of the pretend Xen.
    pub(crate) ports: usize,
    pub(crate) descriptors: usize,
    /// Mapped pages of the ring files.
    pub(crate) pages: usize,
}

impl Resources {
    pub(crate) fn by(host: &Host) -> Resources {
        let proc = format!("/proc/{}", host.daemon.pid());
        let table = fs::read(host.daemon.xen().join("ports")).unwrap();
        let maps = fs::read_to_string(format!("{proc}/maps")).unwrap();
        Resources {
            // Entry 0 has totals.
            ports: table.chunks_exact(16).skip(1).filter(|entry| entry[..4] != [0; 4]).count(),
            descriptors: fs::read_dir(format!("{proc}/fd")).unwrap().count(),
            pages: maps.lines().filter(|line| line.ends_with("/ring")).count(),
        }
    }
}

/// Memory in KiB, without the journal, which is a file of bounded size.
fn memory(host: &Host) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", host.daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Introduces and releases domains. In a batch, the release comes before the ring can be served.
fn rounds(host: &mut Host, count: u16, batch: u16) {
    for number in 0..count / batch {
        let domids = (0..batch).map(|at| 100 + (number * batch + at) % 32);
        let mut bytes = Vec::new();
        for domid in domids {
            let introduce = format!("{domid}\x001\x00{PORT}\0");
            bytes.extend(frame(op::INTRODUCE, 1, 0, introduce.as_bytes()));
            bytes.extend(frame(op::RELEASE, 1, 0, format!("{domid}\0").as_bytes()));
        }
        host.dom0.send(&bytes).unwrap();
        for _ in 0..batch {
            assert_eq!(host.dom0.reply().unwrap().ty, op::INTRODUCE);
            assert_eq!(host.dom0.reply().unwrap().ty, op::RELEASE);
        }
    }
    host.assert_others_served();
}

/// KiB that the allocator may use more after thousands of rounds: 1 MiB is a tenth of a page for
/// each of 10,000.
const TOLERANCE: usize = 1024;

// Fails if a port, a descriptor, a mapped page or memory is lost for each domain that is introduced
// and released, also within one batch.
#[test]
fn ten_thousand_introductions_leave_nothing() {
    let mut host = Host::ours();
    for domid in 100..132 {
        host.fake(domid);
    }
    let before = Resources::by(&host);
    rounds(&mut host, 500, 1);
    rounds(&mut host, 500, 10);
    let memory_before = memory(&host);
    rounds(&mut host, 5000, 1);
    rounds(&mut host, 5000, 10);
    assert_eq!(Resources::by(&host), before);
    let grown = memory(&host).saturating_sub(memory_before);
    assert!(grown < TOLERANCE, "grown by {grown} KiB");
    host.assert_sound();
}

// Fails if a guest that does not read its replies and events makes the daemon use more and more
// memory, or delays another client.
#[test]
fn guest_that_does_not_read_uses_bounded_memory() {
    let mut host = Host::ours();
    let (mut fake, mut conn) = host.guest(5);
    conn.ok(op::WRITE, &format!("long|{}", "x".repeat(1900))).unwrap();
    conn.watch("/local/domain/5|t|").unwrap();
    let request = frame(op::READ, 1, 0, b"long\0");
    let before = memory(&host);
    // As many requests as the daemon reads; it stops when it has 64 KiB of replies.
    let mut sent = 0;
    while sent < 2000 {
        let room = 1024
            - fake.get(word::REQ_PROD).unwrap().wrapping_sub(fake.get(word::REQ_CONS).unwrap());
        if room as usize >= request.len() {
            fake.send(&request).unwrap();
            sent += 1;
            continue;
        }
        // The guest has had a turn by now, and reads no more.
        host.assert_others_served();
        if fake.get(word::REQ_PROD).unwrap().wrapping_sub(fake.get(word::REQ_CONS).unwrap())
            == 1024 - room
        {
            break;
        }
    }
    assert!(sent < 500, "it has been given {sent} answers of 1900 bytes");
    for number in 0..3000 {
        host.dom0.ok(op::WRITE, &format!("/local/domain/5/n{}|", number % 1500)).unwrap();
    }
    let grown = memory(&host).saturating_sub(before);
    // 1,500 nodes of dom0, 1,024 events and 64 KiB of replies.
    assert!(grown < 2 * TOLERANCE, "grown by {grown} KiB");
    host.assert_others_served();
    host.assert_sound();
}
