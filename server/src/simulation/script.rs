//! What each participant does, step by step.

use xenstore_protocol::Operation::{self, *};
use xenstore_protocol::{HEADER_LEN, Header, RequestId, TxId};

use super::clients::PORT;

/// Guests by their place: dom0's kernel, an ordinary one, one that reads late.
pub(super) const DOMIDS: [u16; 3] = [0, 5, 6];
const KERNEL: usize = 0;
const GUEST: usize = 1;
const LATE: usize = 2;

/// An action, after which the script waits until all participants are idle.
pub(super) enum Step {
    /// A guest sends these bytes.
    Send(usize, Vec<u8>),
    /// A guest stops reading, or resumes.
    Reads(usize, bool),
    /// A guest asks for a fresh start.
    Reset(usize),
    /// A guest sets the indices of its ring to 0.
    Zero(usize),
    /// A guest's domain is gone.
    Dies(usize),
    /// There is another domain with its domid.
    Reborn(usize),
    /// The daemon is to begin the next file of its journal.
    Renew,
    /// The tool does something, however often its connection ends.
    Job(Job),
}

/// Requests one after the other. After TRANSACTION_START they are in that transaction.
pub(super) struct Job {
    pub(super) requests: Vec<(Operation, String)>,
    /// Asked when the connection has ended meanwhile: if this is the answer, it was done.
    pub(super) check: (Operation, String, String),
}

/// Bytes of a request, in whose payload `|` is a NUL.
pub(super) fn frame(op: Operation, req_id: u32, tx_id: u32, payload: &str) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { ty: op.as_wire(), req_id: RequestId(req_id), tx_id: TxId(tx_id), len };
    [&header.emit()[..], payload.replace('|', "\0").as_bytes()].concat()
}

#[derive(Default)]
struct Script {
    steps: Vec<Step>,
    last_id: u32,
}

impl Script {
    fn frame(&mut self, op: Operation, tx: u32, payload: &str) -> Vec<u8> {
        self.last_id += 1;
        frame(op, self.last_id, tx, payload)
    }

    fn send(&mut self, who: usize, op: Operation, tx: u32, payload: &str) {
        let frame = self.frame(op, tx, payload);
        self.steps.push(Step::Send(who, frame));
    }

    /// The same in pieces that end at these places.
    fn send_cut(&mut self, who: usize, bytes: &[u8], at: &[usize]) {
        let starts = [0].iter().chain(at);
        let ends = at.iter().copied().chain([bytes.len()]);
        let pieces = starts.zip(ends).map(|(from, to)| Step::Send(who, bytes[*from..to].to_vec()));
        self.steps.extend(pieces);
    }

    fn job(&mut self, requests: &[(Operation, &str)], check: (Operation, &str, &str)) {
        let requests = requests.iter().map(|(op, payload)| (*op, (*payload).to_owned())).collect();
        let check = (check.0, check.1.to_owned(), check.2.to_owned());
        self.steps.push(Step::Job(Job { requests, check }));
    }

    fn introduce(&mut self, domid: u16) {
        let home = format!("/local/domain/{domid}|");
        let owned = format!("{home}n{domid}|");
        let introduce = format!("{domid}|1|{PORT}|");
        let requests = [(Write, &*home), (SetPerms, &owned), (Introduce, &introduce)];
        self.job(&requests, (IsDomainIntroduced, &format!("{domid}|"), "T|"));
    }

    fn write(&mut self, path: &str, value: &str) {
        self.job(&[(Write, &format!("{path}|{value}"))], (Read, &format!("{path}|"), value));
    }

    fn set_up(&mut self) {
        for watch in ["@introduceDomain|i|", "@releaseDomain|r|", "/w|k|"] {
            self.send(KERNEL, Watch, 0, watch);
        }
        self.write("/big", &"v".repeat(4000));
        self.job(&[(SetPerms, "/big|r0|")], (GetPerms, "/big|", "r0|"));
        self.write("/w", "");
        self.job(&[(SetPerms, "/w|r0|")], (GetPerms, "/w|", "r0|"));
        for domid in &DOMIDS[1..] {
            self.introduce(*domid);
        }
        self.send(GUEST, Watch, 0, "home|t|");
        self.send(LATE, Watch, 0, "/w|late|");
    }

    /// Answers that do not fit the ring, and events behind them.
    fn late_reader(&mut self) {
        self.steps.push(Step::Reads(LATE, false));
        let reads: Vec<u8> = (0..2).flat_map(|_| self.frame(Read, 0, "/big|")).collect();
        self.steps.push(Step::Send(LATE, reads));
        self.write("/w/x", "1");
    }

    fn pieces(&mut self) {
        let write = self.frame(Write, 0, "home/a|1");
        self.send_cut(GUEST, &write, &[1, 10, HEADER_LEN, 20]);
        let both = [self.frame(Mkdir, 0, "z|"), self.frame(Mkdir, 0, "a|")].concat();
        self.send_cut(GUEST, &both, &[30]);
    }

    /// One that commits, one that conflicts, one that is given up, and one that stays open.
    fn transactions(&mut self) {
        self.send(GUEST, TransactionStart, 0, "|");
        self.send(KERNEL, Write, 0, "/w/y|k");
        self.send(GUEST, Read, 1, "home/a|");
        self.send(GUEST, Write, 1, "c|mine");
        self.send(GUEST, TransactionEnd, 1, "T|");
        self.send(GUEST, TransactionStart, 0, "|");
        self.send(GUEST, Read, 2, "/w/x|");
        let tx = [
            (TransactionStart, "|"),
            (Read, "/w/x|"),
            (Write, "/w/x|2"),
            (Write, "/w/z|tx"),
            (TransactionEnd, "T|"),
        ];
        self.job(&tx, (Read, "/w/z|", "tx"));
        self.send(GUEST, Write, 2, "d|lost");
        self.send(GUEST, TransactionEnd, 2, "T|");
        self.send(GUEST, TransactionStart, 0, "|");
        self.send(GUEST, Write, 3, "e|open");
        self.send(KERNEL, TransactionStart, 0, "|");
        self.send(KERNEL, Write, 1, "/w/never|1");
        self.send(KERNEL, TransactionEnd, 1, "F|");
    }

    /// Fresh starts: after all is well, and after the guest has broken the protocol.
    fn resets(&mut self) {
        self.steps.push(Step::Reads(LATE, true));
        self.send(LATE, TransactionStart, 0, "|");
        self.steps.push(Step::Reset(LATE));
        self.send(LATE, Write, 1, "x|no such transaction");
        self.send(KERNEL, Write, 0, "/w/n|not heard of");
        let broken = Header { ty: Read.as_wire(), len: 5000, ..Header::default() };
        self.steps.push(Step::Send(LATE, broken.emit().to_vec()));
        // While it has failed, and is not heard.
        self.send(LATE, Write, 0, "w|1");
        self.steps.push(Step::Renew);
        self.steps.push(Step::Reset(LATE));
        self.send(LATE, Watch, 0, "x|t|");
        self.send(LATE, Write, 0, "x|1");
        self.send(LATE, Read, 0, "w|");
    }

    /// As OpenBSD's first driver: all indices are 0 after every reply. Requests of the same and of other
    /// lengths follow, and an event; the watches of before stay. Not after an event alone, which comes
    /// once more then if the process is killed.
    fn zeros(&mut self) {
        for payload in ["w|1", "w|2", "w|a longer one", "w|3"] {
            self.steps.push(Step::Zero(LATE));
            self.send(LATE, Write, 0, payload);
        }
        self.steps.push(Step::Zero(LATE));
        self.write("/local/domain/6/x", "2");
        self.send(LATE, Read, 0, "x|");
        self.steps.push(Step::Zero(LATE));
        self.steps.push(Step::Renew);
        self.send(LATE, Read, 0, "x|");
        // Of a ring with more behind it than it is long.
        self.steps.push(Step::Zero(KERNEL));
        self.send(KERNEL, Write, 0, "/w/zero|1");
        let write = self.frame(Write, 0, "w|in pieces");
        self.steps.push(Step::Zero(LATE));
        self.send_cut(LATE, &write, &[5, HEADER_LEN]);
    }

    fn lives(&mut self) {
        self.job(&[(Release, "6|")], (IsDomainIntroduced, "6|", "F|"));
        self.introduce(6);
        self.send(LATE, Write, 0, "y|1");
        self.send(LATE, Watch, 0, "y|t|");
        self.steps.push(Step::Dies(LATE));
        self.steps.push(Step::Reborn(LATE));
        self.introduce(6);
        self.send(LATE, Read, 0, "y|");
    }

    /// What has come of all that.
    fn look(&mut self) {
        self.send(GUEST, Read, 3, "e|");
        self.send(GUEST, TransactionEnd, 3, "T|");
        for path in ["/", "/w", "/local/domain/5", "/local/domain/6"] {
            self.send(KERNEL, Directory, 0, &format!("{path}|"));
            self.send(KERNEL, GetPerms, 0, &format!("{path}|"));
        }
        for path in ["/w/x", "/w/z", "/local/domain/5/c", "/local/domain/5/d", "/local/domain/5/e"]
        {
            self.send(KERNEL, Read, 0, &format!("{path}|"));
        }
        for query in ["check|", "quota|5|", "quota|6|"] {
            self.send(KERNEL, Control, 0, query);
        }
    }
}

/// All steps.
pub(super) fn script() -> Vec<Step> {
    let mut script = Script::default();
    script.set_up();
    script.late_reader();
    script.pieces();
    script.transactions();
    script.steps.push(Step::Renew);
    script.resets();
    script.zeros();
    script.lives();
    script.look();
    script.steps
}
