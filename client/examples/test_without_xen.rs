//! How to test a XenStore client without Xen: a store in memory, domains that are created and
//! destroyed, a fixed clock, and transactions that fail on demand.

use futures_lite::future::block_on;
use xenstore_client::{Client, DomId, Error, Tree};
use xenstore_embedded::Store;

/// The code under test: increments a number in the store.
async fn count_up(client: &Client, path: &str) -> Result<u32, Error> {
    client
        .transaction(3, async |tx| {
            let text = String::from_utf8_lossy(&tx.read(path).await?).into_owned();
            let next = text.parse().unwrap_or(0) + 1;
            tx.write(path, next.to_string()).await?;
            Ok(next)
        })
        .await
}

fn main() -> Result<(), Error> {
    let store = Store::start();
    let guest = Client::new(store.connect(DomId(5)));
    let dom0 = Client::new(store.connect(DomId::DOM0));

    block_on(async {
        dom0.write("/local/domain/5/counter", "41").await?;
        dom0.set_perms("/local/domain/5/counter", "n5").await?;
        assert_eq!(count_up(&guest, "counter").await?, 42);

        // It survives two conflicts, but not three.
        store.inject_eagain(2);
        assert_eq!(count_up(&guest, "counter").await?, 43);
        store.inject_eagain(3);
        assert!(count_up(&guest, "counter").await.is_err());

        // The toolstack gets an event when a domain is destroyed; its nodes are removed by then.
        let mut releases = dom0.watch("@releaseDomain", None).await?;
        assert_eq!(releases.next().await?, "@releaseDomain");
        store.destroy(DomId(5));
        assert_eq!(releases.next().await?, "@releaseDomain");
        assert!(!dom0.exists("/local/domain/5/counter").await?);
        assert_eq!(guest.read("counter").await, Err(Error::Closed));
        Ok(())
    })
}
