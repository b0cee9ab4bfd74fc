//! Where a connection is between two requests.

use alloc::vec::Vec;

use xenstore_protocol::ring::SIZE;

/// Maximum number of unsent bytes that recovery needs: a connection with more executes no requests.
const UNSENT_MAX: usize = 512 * 1024;

/// Where a connection is between two requests: what a process needs to continue to serve it.
///
/// A live update, a takeover and the journal carry it from one process to the next. The engine leaves it
/// alone: [`Engine::dump`](crate::Engine::dump) returns defaults, and `restore` ignores it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionIo {
    /// Descriptor of a socket.
    pub fd: Option<i32>,
    /// Bytes that were read and not executed: whole requests, then a part of one.
    pub unread: Vec<u8>,
    /// Replies and events that were not sent: the rest of a message, then whole ones.
    pub unsent: Vec<u8>,
    /// Bytes at the start of `unsent` that are the rest of a partly sent message; 0 if it begins with a
    /// whole one.
    pub partly_sent: usize,
    /// The local port of a ring's event channel, bound on [`ServerIo::evtchn`](super::ServerIo::evtchn).
    pub port: Option<u32>,
    /// The port of that channel in the domain.
    pub remote_port: Option<u32>,
    /// The page of a ring, if it was introduced with one.
    pub gfn: Option<u64>,
    /// The server's indices of a ring: `req_cons` after the requests that were read, and `rsp_prod` before
    /// `unsent`. `None` if only the page has them.
    pub indices: Option<(u32, u32)>,
    /// All bytes of requests that were read since the ring began at index 0; empty if they are unknown
    /// or more than a ring holds. Not in a stream: only recovery from a journal needs them.
    pub requests: Vec<u8>,
    /// The guest violated the protocol. The connection is not served until the guest reconnects.
    pub failed: bool,
}

/// Progress of a ring, as recovery follows it from the records of a journal.
impl ConnectionIo {
    /// A ring from which nothing was read.
    pub fn new_ring() -> ConnectionIo {
        ConnectionIo { indices: Some((0, 0)), ..ConnectionIo::default() }
    }

    /// The ring at the snapshot of a journal. A failed connection restarts at index 0.
    pub fn of_snapshot(io: &ConnectionIo) -> ConnectionIo {
        if io.failed {
            return ConnectionIo::new_ring();
        }
        let (unread, unsent) = (io.unread.clone(), io.unsent.clone());
        ConnectionIo {
            unread,
            unsent,
            indices: Some(io.indices.unwrap_or_default()),
            ..ConnectionIo::default()
        }
    }

    /// These requests were executed, and got these replies.
    pub fn executed(&mut self, requests: &[u8], replies: &[u8]) {
        let known = self.unread.len().min(requests.len());
        self.unread.drain(..known);
        self.read(&requests[known..]);
        self.queue(replies);
    }

    /// Replies or events were queued.
    pub fn queue(&mut self, bytes: &[u8]) {
        self.unsent.extend_from_slice(bytes);
        if self.unsent.len() > 2 * UNSENT_MAX {
            let sent = self.unsent.len() - UNSENT_MAX;
            self.unsent.drain(..sent);
            let (_, rsp_prod) = self.indices.get_or_insert_default();
            *rsp_prod = rsp_prod.wrapping_add(word(sent));
        }
    }

    /// The last `count` queued bytes were removed.
    pub fn withdraw(&mut self, count: u32) {
        self.unsent.truncate(self.unsent.len().saturating_sub(count as usize));
    }

    /// These are all bytes that were read and not executed.
    pub fn set_unread(&mut self, bytes: &[u8]) {
        match bytes.get(self.unread.len()..) {
            Some(new) => self.read(new),
            // The guest has set the indices to 0, which drops requests: see `zeroed`.
            None => {
                self.requests.clear();
                let dropped = word(self.unread.len() - bytes.len());
                let (req_cons, _) = self.indices.get_or_insert_default();
                *req_cons = req_cons.wrapping_sub(dropped);
            }
        }
        self.unread = bytes.to_vec();
    }

    /// The guest has set its indices to 0 when the last `unsent` bytes were not sent yet.
    pub fn zeroed(&mut self, unsent: u32) {
        let keep = self.unsent.len().min(unsent as usize);
        self.unsent.drain(..self.unsent.len() - keep);
        self.requests.clear();
        self.indices = Some((0, 0));
    }

    fn read(&mut self, requests: &[u8]) {
        let (req_cons, _) = self.indices.get_or_insert_default();
        let is_known = word(self.requests.len()) == *req_cons;
        *req_cons = req_cons.wrapping_add(word(requests.len()));
        if is_known && *req_cons <= SIZE {
            self.requests.extend_from_slice(requests);
        } else {
            self.requests.clear();
        }
    }
}

fn word(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(req_cons: u32) -> ConnectionIo {
        ConnectionIo { indices: Some((req_cons, 0)), ..ConnectionIo::default() }
    }

    fn req_cons(io: &ConnectionIo) -> u32 {
        io.indices.unwrap().0
    }

    /// `rsp_prod` after the unsent bytes.
    fn rsp_end(io: &ConnectionIo) -> u32 {
        io.indices.unwrap().1.wrapping_add(word(io.unsent.len()))
    }

    // Fails if bytes are counted twice or not at all, however they were read.
    #[test]
    fn bytes_are_counted_once() {
        let mut io = ring(u32::MAX - 10);
        io.executed(&[1; 20], b"abc");
        assert_eq!((req_cons(&io), rsp_end(&io)), (9, 3));
        io.set_unread(&[1; 30]);
        assert_eq!(req_cons(&io), 39);
        io.executed(&[1; 20], b"");
        assert_eq!((req_cons(&io), io.unread.len()), (39, 10));
        io.executed(&[1; 25], b"d");
        assert_eq!((req_cons(&io), io.unread.len(), rsp_end(&io)), (54, 0, 4));
        assert_eq!(io.unsent, b"abcd");
        io.set_unread(&[1; 7]);
        io.set_unread(&[1; 9]);
        assert_eq!(req_cons(&io), 63);
    }

    // Fails if requests that were read from index 0 on are out of order, or count as known when some are
    // missing.
    #[test]
    fn requests_from_index_0_are_known_up_to_the_size_of_a_ring() {
        let mut io = ConnectionIo::new_ring();
        io.executed(b"abc", b"");
        io.set_unread(b"de");
        io.set_unread(b"def");
        io.executed(b"defg", b"");
        assert_eq!((&io.requests[..], req_cons(&io)), (&b"abcdefg"[..], 7));
        io.executed(&[1; 1017], b"");
        assert_eq!((io.requests.len(), req_cons(&io)), (1024, 1024));
        io.executed(b"h", b"");
        io.executed(b"i", b"");
        assert_eq!((io.requests.len(), req_cons(&io)), (0, 1026));
        let mut io = ring(10);
        io.executed(b"abc", b"");
        assert_eq!((io.requests.len(), req_cons(&io)), (0, 13), "the first 10 are unknown");
    }

    // Fails if old bytes of a ring that its guest has set to 0 are counted, or if unsent bytes are lost.
    #[test]
    fn a_ring_set_to_0_counts_from_0() {
        let mut io = ring(5000);
        io.set_unread(b"request and half of ano");
        io.queue(b"written, unsent");
        io.set_unread(b"request");
        io.zeroed(6);
        assert_eq!((req_cons(&io), rsp_end(&io), &io.unsent[..]), (0, 6, &b"unsent"[..]));
        io.executed(b"request", b"!");
        assert_eq!((req_cons(&io), rsp_end(&io), &io.unsent[..]), (0, 7, &b"unsent!"[..]));
        io.executed(b"new", b"");
        assert_eq!((req_cons(&io), &io.requests[..]), (3, &b"new"[..]));
    }

    // Fails if a withdrawn reply counts as queued, or the one that replaces it does not: recovery would
    // take the ring for an invalid one.
    #[test]
    fn a_replaced_reply_counts_when_it_is_queued() {
        let mut io = ConnectionIo::new_ring();
        io.executed(b"request", b"first");
        io.executed(b"update", b"OK");
        io.withdraw(2);
        assert_eq!((rsp_end(&io), &io.unsent[..]), (5, &b"first"[..]));
        io.queue(b"a report");
        assert_eq!((rsp_end(&io), &io.unsent[..]), (13, &b"firsta report"[..]));
    }

    // Fails if the unsent bytes of a recovery grow without limit, or if dropped ones are not counted.
    #[test]
    fn unsent_bytes_are_bounded() {
        let mut io = ConnectionIo::new_ring();
        for _ in 0..300 {
            io.queue(&[7; 4096]);
        }
        assert!(io.unsent.len() <= 2 * UNSENT_MAX);
        assert_eq!(rsp_end(&io), 300 * 4096);
    }
}
