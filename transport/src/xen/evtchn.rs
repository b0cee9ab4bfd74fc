//! `/dev/xen/evtchn`: event channels, by the calls of `xen/evtchn.h`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::ioctl::Opcode;
use xenstore_sys::inherit;
use xenstore_sys::ioctl::call;

use super::{EVTCHN_DEVICE, Evtchn, VIRQ_DOM_EXC};
use crate::driver::{Driver, Source};

const BIND_VIRQ: Opcode = 0x0004_4500;
const BIND_INTERDOMAIN: Opcode = 0x0008_4501;
const UNBIND: Opcode = 0x0004_4503;
const NOTIFY: Opcode = 0x0004_4504;
const RESET: Opcode = 0x0000_4505;

/// Ports that are read at once, as many as the device gives.
const PORTS: usize = 1024;

/// The device. Close-on-exec: whoever hands it on says so.
#[derive(Debug)]
pub(crate) struct Device {
    device: Source<File>,
    buffer: Mutex<Vec<u8>>,
}

impl Device {
    pub(crate) fn open(driver: &Driver) -> io::Result<Device> {
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(EVTCHN_DEVICE)
            .map_err(|error| io::Error::new(error.kind(), format!("{EVTCHN_DEVICE}: {error}")))?;
        Device::with(device, driver)
    }

    /// Goes on with a device that is open; its ports are still bound.
    pub(crate) fn adopt(left: OwnedFd, driver: &Driver) -> io::Result<Device> {
        let device = inherit::evtchn(left)?;
        rustix::io::ioctl_fionbio(&device, true)?;
        Device::with(device.into(), driver)
    }

    fn with(device: File, driver: &Driver) -> io::Result<Device> {
        Ok(Device { device: driver.source(device)?, buffer: Mutex::new(vec![0; PORTS * 4]) })
    }

    fn bound(&self, opcode: Opcode, argument: &mut [u32; 2]) -> io::Result<u32> {
        let port = call(&self.device, opcode, argument)?;
        u32::try_from(port).map_err(|_| io::Error::other(format!("port {port} from the kernel")))
    }
}

impl Evtchn for Device {
    fn bind(&self, domid: u16, remote: u32) -> io::Result<u32> {
        self.bound(BIND_INTERDOMAIN, &mut [domid.into(), remote])
    }

    fn bind_domain_exc(&self) -> io::Result<u32> {
        self.bound(BIND_VIRQ, &mut [VIRQ_DOM_EXC, 0])
    }

    fn unbind(&self, port: u32) -> io::Result<()> {
        call(&self.device, UNBIND, &mut [port]).map(drop)
    }

    fn notify(&self, port: u32) -> io::Result<()> {
        call(&self.device, NOTIFY, &mut [port]).map(drop)
    }

    fn poll_ports(&self, cx: &mut Context<'_>, ports: &mut Vec<u32>) -> Poll<io::Result<()>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let attempt = |mut device: &File| match device.read(&mut buffer) {
            // There was no room for an event: a kernel before 4.4, or ports that were unmasked
            // while they had one waiting. Nothing is read until this.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                call(device, RESET, &mut [])?;
                Err(error)
            }
            result => result,
        };
        // A short read does not say that the device is empty: it wakes only whoever waits for an
        // empty one, and it is not empty for it until a read has returned. What came meanwhile
        // would be told to nobody, so there is another read before anybody waits.
        let count = ready!(self.device.poll_read(cx, attempt))?;
        let words = buffer[..count].as_chunks::<4>().0;
        ports.extend(words.iter().map(|word| u32::from_ne_bytes(*word)));
        Poll::Ready(Ok(()))
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    fn unmask(&self, ports: &[u32]) -> io::Result<()> {
        let bytes: Vec<u8> = ports.iter().flat_map(|port| port.to_ne_bytes()).collect();
        self.device.get().write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    // Fails if a short read is taken for an empty device: an event that comes while the kernel
    // copies the ones before it is not told, and its guest would never be heard again.
    #[test]
    fn an_event_that_is_not_told_is_read() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let reader = OwnedFd::from(reader);
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        // Nobody runs the driver's loop: nothing is told.
        let device = Device::with(File::from(reader), &Driver::new().unwrap()).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut ports = Vec::new();
        for port in [7_u32, 8] {
            writer.write_all(&port.to_ne_bytes()).unwrap();
            assert!(device.poll_ports(&mut cx, &mut ports).is_ready(), "port {port} is lost");
        }
        assert_eq!(ports, [7, 8]);
        assert!(device.poll_ports(&mut cx, &mut ports).is_pending());
    }
}
