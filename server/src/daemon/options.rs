//! The command line: options of C xenstored, of oxenstored, and of this daemon.

use std::path::{Path, PathBuf};

use clap::{ArgAction, Parser};
use xenstore_protocol::{DomId, Quota};
use xenstore_store::{Config, Quotas};
use xenstore_transport::xen::Roles;

use crate::daemon::oxenstored_conf;

/// XenStore daemon. Without Xen it serves a standalone store.
#[derive(Parser, Debug, Default)]
#[command(
    name = "xenstored",
    version,
    disable_version_flag = true,
    disable_help_flag = true,
    args_override_self = true
)]
pub(crate) struct Options {
    /// Print this help.
    #[arg(short = 'H', long, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version.
    #[arg(long, action = ArgAction::Version)]
    version: Option<bool>,
    /// Stay in the foreground. Otherwise a daemon with a pid file moves to the background as soon
    /// as it serves requests.
    #[arg(short = 'N', long)]
    pub(crate) no_fork: bool,
    /// Write the process id to this file and keep it locked.
    #[arg(short = 'F', long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Listen on this socket. Otherwise $XENSTORED_PATH, $XENSTORED_RUNDIR/socket,
    /// /run/xenstored/socket, or a place that the user may write to.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Do not listen on a socket.
    #[arg(long)]
    pub(crate) disable_socket: bool,
    /// Directory of the journal, from which the next process recovers if this one ends
    /// unexpectedly; `none` for no journal. Otherwise SOCKET.journal beside the socket, or in /dev/shm
    /// if that is a disk.
    #[arg(long, value_name = "DIR")]
    pub(crate) journal: Option<PathBuf>,
    /// End with an error if this is not a Xen host.
    #[arg(long)]
    pub(crate) require_xen: bool,
    /// Use a pretend Xen made of files in this directory, for tests.
    #[cfg(any(test, feature = "test-doubles"))]
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) pretend_xen: Option<PathBuf>,
    /// Write a line for each request to this file.
    #[arg(short = 'T', long, value_name = "FILE")]
    pub(crate) trace_file: Option<PathBuf>,
    /// Turn a trace switch on or off: +obj, -io, …
    #[arg(long, value_name = "±SWITCH", allow_hyphen_values = true)]
    pub(crate) trace_control: Vec<String>,
    /// Take options from an oxenstored.conf.
    #[arg(long, value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,
    /// Check options and configuration file, then end.
    #[arg(long)]
    pub(crate) config_test: bool,
    /// Limit a quota of domains: nodes, watches, outstanding, memory, transactions,
    /// transaction-nodes, node-permissions, path-max, node-size. 0 means no limit.
    #[arg(short = 'Q', long, value_name = "WHAT=N")]
    quota: Vec<String>,
    /// Warn when a domain exceeds this: memory.
    #[arg(short = 'q', long, value_name = "WHAT=N")]
    quota_soft: Vec<String>,
    /// Limit the nodes that a domain owns.
    #[arg(short = 'E', long, value_name = "N")]
    entry_nb: Option<u32>,
    /// Limit the size of a node, in bytes.
    #[arg(short = 'S', long, value_name = "BYTES")]
    entry_size: Option<u32>,
    /// Limit the watches of a domain.
    #[arg(short = 'W', long, value_name = "N")]
    watch_nb: Option<u32>,
    /// Limit the open transactions of a domain.
    #[arg(short = 't', long, value_name = "N")]
    transaction: Option<u32>,
    /// Limit the permission entries of a node.
    #[arg(short = 'A', long, value_name = "N")]
    perm_nb: Option<u32>,
    /// Limit the length of a path below the domain's own, in bytes; at most 2048.
    #[arg(short = 'M', long, value_name = "BYTES")]
    path_max: Option<u32>,
    /// Accepted without effect: events are never dropped.
    #[arg(short = 'w', long, value_name = "WHAT=SECONDS")]
    timeout: Vec<String>,
    /// Transfer the nodes of a dead domain to the privileged domain.
    #[arg(short = 'K', long)]
    keep_orphans: bool,
    /// Domain that the daemon runs in [default: named by the hypervisor, else 0].
    #[arg(short = 'm', long, value_name = "DOMID")]
    pub(crate) master_domid: Option<u16>,
    /// Domain with all rights [default: named by the hypervisor, else 0].
    #[arg(short = 'p', long, value_name = "DOMID")]
    priv_domid: Option<u16>,
    /// Accepted without effect: only a store in a separate domain needs it.
    #[arg(short = 'e', long, value_name = "PORT")]
    event: Option<u32>,
    /// Continue from the state of a running daemon.
    #[arg(short = 'U', long)]
    pub(crate) live_update: bool,
    /// Check that a start from the state of a running daemon, on standard input, would succeed, then
    /// end.
    #[arg(long)]
    pub(crate) check_state: bool,
    /// The state from which this program resumes, as a descriptor.
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) resume: Option<i32>,
    /// What goes with that state.
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) errand: Option<i32>,
    /// Wait until the process that has gone on from that state has answered, for as long as it says
    /// here, or go on in its place.
    #[arg(long, value_name = "FD,FD,PID,MS", hide = true)]
    pub(crate) guard: Option<String>,
    /// Fail to read that state, for tests.
    #[cfg(any(test, feature = "test-doubles"))]
    #[arg(long, hide = true)]
    refuse_state: bool,
    /// Taken from C xenstored up to 4.17 and not used.
    #[arg(short = 'P', long, hide = true)]
    output_pid: bool,
    /// Taken from C xenstored up to 4.17 and not used.
    #[arg(short = 'R', long, hide = true)]
    no_recovery: bool,
    /// Taken from C xenstored up to 4.17 and not used.
    #[arg(short = 'I', long, value_name = "ON|OFF", num_args = 0..=1, require_equals = true, hide = true)]
    internal_db: Option<Option<String>>,
    /// Taken from C xenstored up to 4.17 and not used.
    #[arg(short = 'V', long, hide = true)]
    verbose: bool,
    /// Taken from oxenstored and C xenstored and not used.
    #[arg(short = 'D', long, hide = true)]
    no_domain_init: bool,
    /// Taken from oxenstored and not used.
    #[arg(long, hide = true)]
    reraise_top_level: bool,
    /// Taken from oxenstored and not used: there is an access log only with --trace-file.
    #[arg(long, hide = true)]
    no_access_log: bool,
    /// Continue from the state that oxenstored left.
    #[arg(long, hide = true)]
    pub(crate) restart: bool,
    /// The same without listening again.
    #[arg(long, hide = true)]
    pub(crate) live: bool,
}

/// Everything that options and configuration file decide.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The command line, with what the configuration file adds.
    pub(crate) options: Options,
    /// For the engine.
    pub(crate) config: Config,
    /// Things that were accepted and do nothing, one line each.
    pub(crate) remarks: Vec<String>,
}

impl Settings {
    /// Takes the control domain and the store domain from the hypervisor where no option names them.
    pub(crate) fn with_roles(mut self, roles: Roles) -> Settings {
        if let (None, Some(domid)) = (self.options.priv_domid, roles.control) {
            self.config.privileged = domid;
        }
        if let (None, Some(domid)) = (self.options.master_domid, roles.store) {
            self.config.store = domid;
        }
        self
    }
}

/// What ends the start, in one line.
pub(crate) type Complaint = String;

impl Options {
    /// Reads a command line. An error is one line that names what is wrong; help and version are
    /// errors of which `use_stderr` says no.
    pub(crate) fn parse_from_args(
        args: impl IntoIterator<Item = std::ffi::OsString>,
    ) -> Result<Options, clap::Error> {
        Options::try_parse_from(args)
    }

    /// The directory of the pretend Xen. `None` without the feature `test-doubles`.
    pub(crate) fn pretend_xen(&self) -> Option<&Path> {
        #[cfg(any(test, feature = "test-doubles"))]
        return self.pretend_xen.as_deref();
        #[cfg(not(any(test, feature = "test-doubles")))]
        None
    }

    /// Returns true if the state must be refused. False without the feature `test-doubles`.
    pub(crate) fn refuse_state(&self) -> bool {
        #[cfg(any(test, feature = "test-doubles"))]
        return self.refuse_state;
        #[cfg(not(any(test, feature = "test-doubles")))]
        false
    }

    /// Applies quotas, configuration file and defaults. Later options win over earlier ones, and
    /// the command line over the file.
    pub(crate) fn settle(mut self) -> Result<Settings, Complaint> {
        let mut quotas = Quotas::default();
        let mut remarks = Vec::new();
        if let Some(path) = self.config_file.clone() {
            let text = std::fs::read_to_string(&path).map_err(|error| {
                format!("--config-file {}: cannot be read: {error}", path.display())
            })?;
            let file = oxenstored_conf::parse(&path.display().to_string(), &text)?;
            if self.config_test
                && let Some(unknown) = file.unknown.first()
            {
                return Err(unknown.clone());
            }
            quotas = file.quotas;
            self.pid_file = self.pid_file.or(file.pid_file);
            remarks.extend(file.unknown);
        }
        self.apply_quotas(&mut quotas, &mut remarks)?;
        for switch in &self.trace_control {
            crate::log::check_switch(switch)
                .ok_or_else(|| format!("--trace-control {switch}: no such switch"))?;
        }
        for (name, id) in [("--master-domid", self.master_domid), ("--priv-domid", self.priv_domid)]
        {
            if let Some(id) = id.filter(|id| !DomId(*id).is_ordinary()) {
                return Err(format!("{name} {id}: not a domain id (0 to 32751)"));
            }
        }
        for timeout in &self.timeout {
            let seconds = timeout.split_once('=').filter(|(what, _)| *what == "watch-event");
            if seconds.is_none_or(|(_, value)| value.parse::<u32>().is_err()) {
                return Err(format!("--timeout {timeout}: expected watch-event=SECONDS"));
            }
        }
        let config = Config {
            privileged: DomId(self.priv_domid.unwrap_or(0)),
            store: DomId(self.master_domid.unwrap_or(0)),
            keep_orphans: self.keep_orphans,
            quotas,
        };
        Ok(Settings { options: self, config, remarks })
    }

    fn apply_quotas(
        &self,
        quotas: &mut Quotas,
        remarks: &mut Vec<String>,
    ) -> Result<(), Complaint> {
        let single = [
            (Quota::Nodes, self.entry_nb),
            (Quota::NodeSize, self.entry_size),
            (Quota::Watches, self.watch_nb),
            (Quota::Transactions, self.transaction),
            (Quota::NodePermissions, self.perm_nb),
            // A longer path than the protocol's could be created and not be named.
            (Quota::PathMax, self.path_max.map(|max| max.min(2048))),
        ];
        for (quota, limit) in single {
            if let Some(limit) = limit {
                quotas.set(quota, limit);
            }
        }
        let hard = self.quota.iter().map(|text| ("--quota", "", text));
        let soft = self.quota_soft.iter().map(|text| ("--quota-soft", "soft-", text));
        for (option, prefix, text) in hard.chain(soft) {
            let limit = text
                .split_once('=')
                .and_then(|(name, value)| Some((format!("{prefix}{name}"), value.parse().ok()?)));
            let Some((name, limit)) = limit else {
                return Err(format!("{option} {text}: expected WHAT=N"));
            };
            match Quota::parse(name.as_bytes()) {
                Some(quota) => quotas.set(quota, limit),
                // Names come and go between Xen versions; a host must start all the same.
                None => remarks.push(format!("{option} {text}: no such quota, ignored")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(args: &[&str]) -> Result<Settings, String> {
        let args = std::iter::once("xenstored").chain(args.iter().copied()).map(Into::into);
        Options::parse_from_args(args).map_err(|e| crate::daemon::one_line(&e))?.settle()
    }

    // Fails if an option that launch-xenstore or an administrator of C xenstored uses is refused,
    // or means something else.
    #[test]
    fn options_of_c_xenstored_are_taken() {
        let settings = settle(&[
            "--pid-file",
            "/run/xen/xenstored.pid",
            "-N",
            "-T",
            "/tmp/t",
            "-E",
            "1",
            "-S",
            "2",
            "-W",
            "3",
            "-t",
            "4",
            "-A",
            "5",
            "-M",
            "4096",
            "-Q",
            "memory=6",
            "-q",
            "memory=7",
            "-w",
            "watch-event=20",
            "-K",
            "-m",
            "1",
            "-p",
            "2",
            "-U",
            "--trace-control=+io",
            "-Q",
            "new-in-4.30=1",
            "-e",
            "3",
        ])
        .unwrap();
        let limit = |name: &[u8]| settings.config.quotas.get(Quota::parse(name).unwrap());
        let limits: [&[u8]; 8] = [
            b"nodes",
            b"node-size",
            b"watches",
            b"transactions",
            b"node-permissions",
            b"path-max",
            b"memory",
            b"soft-memory",
        ];
        assert_eq!(limits.map(limit), [1, 2, 3, 4, 5, 2048, 6, 7]);
        assert_eq!((settings.config.store, settings.config.privileged), (DomId(1), DomId(2)));
        assert!(settings.config.keep_orphans && settings.options.no_fork);
        assert_eq!(settings.remarks, ["--quota new-in-4.30=1: no such quota, ignored"]);
        assert!(settle(&["--no-domain-init", "--no-access-log", "--disable-socket"]).is_ok());
    }

    // Fails if what the hypervisor says of its domains is ignored, or wins over an option.
    #[test]
    fn options_win_over_what_the_hypervisor_says() {
        let roles = Roles { control: Some(DomId(3)), store: Some(DomId(4)) };
        for (args, privileged, store) in [
            (&["-m", "1", "-p", "2"][..], 2, 1),
            (&["-m", "0"], 3, 0),
            (&["-p", "0"], 0, 4),
            (&[], 3, 4),
        ] {
            let config = settle(args).unwrap().with_roles(roles).config;
            assert_eq!((config.privileged, config.store), (DomId(privileged), DomId(store)));
        }
        let config = settle(&[]).unwrap().with_roles(Roles::default()).config;
        assert_eq!((config.privileged, config.store), (DomId(0), DomId(0)));
    }

    // Fails if an option is missing in the list that `tests/tests/update/options.rs` plays: what it does
    // at a live update would not be tested.
    #[test]
    fn every_option_is_in_the_list_for_live_updates() {
        use clap::CommandFactory;
        let list = include_str!("../../../tests/tests/update/options.txt");
        let cases: Vec<&str> = list.lines().filter(|line| !line.starts_with('#')).collect();
        let has = |name: String| cases.iter().any(|case| case.split([' ', '=']).any(|w| w == name));
        for option in Options::command().get_arguments() {
            let long = option.get_long().unwrap();
            assert!(has(format!("--{long}")), "--{long}");
            assert!(option.get_short().is_none_or(|short| has(format!("-{short}"))), "--{long}");
        }
    }

    // Fails if a mistake takes more than one line to tell, or the line does not name it.
    #[test]
    fn mistakes_are_told_in_one_line_that_names_them() {
        for (args, name) in [
            (&["--bogus"][..], "--bogus"),
            (&["-E", "many"], "many"),
            (&["-Q", "nodes"], "--quota nodes"),
            (&["-Q", "nodes=x"], "--quota nodes=x"),
            (&["-w", "watch-event"], "--timeout watch-event"),
            (&["--trace-control=+bogus"], "+bogus"),
            (&["-p", "40000"], "--priv-domid 40000"),
            (&["--config-file", "/nonexistent"], "/nonexistent"),
            (&["extra"], "extra"),
        ] {
            let text = settle(args).unwrap_err();
            assert!(text.contains(name) && !text.trim_end().contains('\n'), "{args:?}: {text:?}");
        }
    }
}
