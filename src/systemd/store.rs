//! The descriptor store of the service (FileDescriptorStoreMax=, sd_pid_notify_with_fds(3)): stored descriptors outlive
//! this process, also kill −9, and are passed to the next one.
//! Promises that orders arrive in order and that callers do not wait for systemd. Does not know what the descriptors are.

use std::env;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use tokio::sync::oneshot;

/// Where systemd listens (sd_notify(3)).
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
/// How many descriptors systemd stores for this service (systemd.exec(5), since 254). Without it there is no store.
const FDSTORE: &str = "FDSTORE";

/// Called when systemd has an order, or the order could not be sent.
type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// One datagram to systemd.
struct Order {
    text: String,
    descriptor: Option<OwnedFd>,
    done: Done,
}

/// The service's descriptor store. Clones share it.
#[derive(Debug, Clone)]
pub struct DescriptorStore {
    orders: Sender<Order>,
    capacity: usize,
}

impl DescriptorStore {
    /// The store that systemd announces in the environment, if it does.
    ///
    /// # Errors
    /// Where systemd's socket cannot be reached, or no thread can be started.
    pub fn from_environment() -> io::Result<Option<DescriptorStore>> {
        let capacity = env::var(FDSTORE).ok().and_then(|max| max.parse().ok());
        match (env::var_os(NOTIFY_SOCKET), capacity) {
            (Some(path), Some(capacity)) if capacity > 0 => {
                DescriptorStore::at(path.as_bytes(), capacity).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The store of the service manager that listens at `path` (`@` stands for the abstract name space).
    fn at(path: &[u8], capacity: usize) -> io::Result<DescriptorStore> {
        let address = match path.strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(path)?,
        };
        let kind = (AddressFamily::UNIX, SocketType::DGRAM);
        let socket = socket_with(kind.0, kind.1, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &address)?;
        let (orders, received) = channel();
        thread::Builder::new()
            .name("descriptors".to_owned())
            .spawn(move || work(&socket, &received))?;
        Ok(DescriptorStore { orders, capacity })
    }

    /// How many descriptors it can store.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Stores a duplicate of a descriptor under a name. `done` is called with the result of sending it.
    ///
    /// # Errors
    /// Where the descriptor cannot be duplicated; `done` is not called then.
    pub fn put(
        &self,
        name: &str,
        descriptor: BorrowedFd<'_>,
        done: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<()> {
        let descriptor = Some(descriptor.try_clone_to_owned()?);
        let text = format!("FDSTORE=1\nFDNAME={name}\n");
        self.order(text, descriptor, Box::new(done));
        Ok(())
    }

    /// Removes the descriptors of this name. Those that are stored under it from now on stay.
    pub fn remove(&self, name: &str) {
        let text = format!("FDSTOREREMOVE=1\nFDNAME={name}\n");
        self.order(text, None, Box::new(drop));
    }

    /// Waits until systemd has all orders that were given before.
    pub async fn settle(&self) {
        let (done, settled) = oneshot::channel();
        let done = Box::new(move |_| {
            // The receiver may have been dropped.
            let _ = done.send(());
        });
        self.order(String::new(), None, done);
        // Fails only when the thread has ended, and then there is nothing to wait for.
        let _ = settled.await;
    }

    fn order(&self, text: String, descriptor: Option<OwnedFd>, done: Done) {
        let order = Order {
            text,
            descriptor,
            done,
        };
        if let Err(unsent) = self.orders.send(order) {
            (unsent.0.done)(Err(io::ErrorKind::BrokenPipe.into()));
        }
    }
}

/// Sends order after order, until all stores are dropped.
fn work(systemd: &OwnedFd, orders: &Receiver<Order>) {
    for order in orders {
        let sent = match order.text.as_str() {
            "" => Ok(()),
            text => send(systemd, text, order.descriptor.as_ref()),
        };
        (order.done)(sent);
    }
}

/// Sends one datagram; waits while systemd's queue is full.
fn send(systemd: &OwnedFd, text: &str, descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(descriptors) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let parts = [IoSlice::new(text.as_bytes())];
    loop {
        match sendmsg(systemd, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    #[tokio::test]
    async fn orders_arrive_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let store = DescriptorStore::at(path.as_os_str().as_bytes(), 7).unwrap();
        assert_eq!(store.capacity(), 7);
        let done = |sent: io::Result<()>| sent.unwrap();
        store.put("consumer-1", systemd.as_fd(), done).unwrap();
        store.remove("consumer-1");
        store.settle().await;
        let mut text = [0; 100];
        for expected in [
            "FDSTORE=1\nFDNAME=consumer-1\n",
            "FDSTOREREMOVE=1\nFDNAME=consumer-1\n",
        ] {
            let count = systemd.recv(&mut text).unwrap();
            assert_eq!(std::str::from_utf8(&text[..count]).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn a_systemd_that_has_gone_is_no_reason_to_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let store = DescriptorStore::at(path.as_os_str().as_bytes(), 7).unwrap();
        drop(systemd);
        let (told, heard) = oneshot::channel();
        let kept = tempfile::tempfile().unwrap();
        let done = |sent: io::Result<()>| told.send(sent.is_err()).unwrap();
        store.put("consumer-1", kept.as_fd(), done).unwrap();
        assert!(heard.await.unwrap());
        store.remove("consumer-1");
        store.settle().await;
    }
}
