//! The `xenstored` program.

use std::path::PathBuf;
use std::time::Instant;

use futures_lite::StreamExt;
use smol::LocalExecutor;
use xenstore_store::Config;
use xenstore_transport::socket::Listener;
use xenstored::{Clock, Server, Standalone};

fn main() -> std::io::Result<()> {
    let path = PathBuf::from(std::env::args().nth(1).expect("socket path"));
    let server =
        Server::new(&Config::default(), Standalone::default(), Clock::Real(Instant::now()));
    let executor = LocalExecutor::new();
    smol::block_on(executor.run(async {
        let listener = Listener::bind(&path, 0o600).await?;
        let mut signals =
            async_signal::Signals::new([async_signal::Signal::Term, async_signal::Signal::Int])?;
        let accept = async {
            server.accept(&listener, &executor).await;
        };
        futures_lite::future::or(accept, async {
            signals.next().await;
        })
        .await;
        Ok(())
    }))
}
