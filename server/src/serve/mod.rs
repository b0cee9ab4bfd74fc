//! Serving: connections, their inputs to the engine, tasks and the clock.

mod clock;
mod connection;
mod inputs;
mod server;
mod tasks;

pub use clock::Clock;
pub(crate) use inputs::Failed;
pub use server::Server;
pub use tasks::Tasks;
