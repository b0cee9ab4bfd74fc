//! Event channels through `/dev/xen/evtchn`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use xenstore_protocol::{DomId, EvtchnPort};
use xenstore_sys::inherit;
use xenstore_sys::xen::{self, EVTCHN_DEVICE};

use super::{Evtchn, VIRQ_DOM_EXC};
use crate::driver::{Driver, Source};

/// Ports that one read returns, as many as the device has.
const PORTS: usize = 1024;

/// The device. Its descriptor is close-on-exec.
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

    /// Takes over an open device, whose ports are still bound.
    pub(crate) fn adopt(inherited: OwnedFd, driver: &Driver) -> io::Result<Device> {
        let device = inherit::evtchn(inherited)?;
        rustix::io::ioctl_fionbio(&device, true)?;
        Device::with(device.into(), driver)
    }

    fn with(device: File, driver: &Driver) -> io::Result<Device> {
        Ok(Device { device: driver.source(device)?, buffer: Mutex::new(vec![0; PORTS * 4]) })
    }
}

impl Evtchn for Device {
    fn bind(&self, domid: DomId, remote: EvtchnPort) -> io::Result<EvtchnPort> {
        xen::bind_interdomain(&self.device, domid.0, remote.0).map(EvtchnPort)
    }

    fn bind_domain_exc(&self) -> io::Result<EvtchnPort> {
        xen::bind_virq(&self.device, VIRQ_DOM_EXC).map(EvtchnPort)
    }

    fn unbind(&self, port: EvtchnPort) -> io::Result<()> {
        xen::unbind(&self.device, port.0)
    }

    fn notify(&self, port: EvtchnPort) -> io::Result<()> {
        xen::notify(&self.device, port.0)
    }

    fn poll_ports(
        &self,
        cx: &mut Context<'_>,
        ports: &mut Vec<EvtchnPort>,
    ) -> Poll<io::Result<()>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let attempt = |mut device: &File| match device.read(&mut buffer) {
            // The queue has overflowed: with a kernel before 4.4, or by unmasking ports that had an
            // event. Reads fail until the reset.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                xen::reset(device)?;
                Err(error)
            }
            result => result,
        };
        // After a short read the device can have events: the kernel wakes only a reader of an empty
        // queue, and empties the queue when a read has returned. So `drained` is not called, and the
        // next call reads again.
        let count = ready!(self.device.poll_read(cx, attempt))?;
        let words = buffer[..count].as_chunks::<4>().0;
        ports.extend(words.iter().map(|word| EvtchnPort(u32::from_ne_bytes(*word))));
        Poll::Ready(Ok(()))
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    fn unmask(&self, ports: &[EvtchnPort]) -> io::Result<()> {
        let bytes: Vec<u8> = ports.iter().flat_map(|port| port.0.to_ne_bytes()).collect();
        self.device.get().write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    // Fails if a short read counts as an empty device: an event that arrives while the kernel copies
    // others causes no wake-up, and its guest would not be served again.
    #[test]
    fn event_without_a_wake_up_is_read() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let reader = OwnedFd::from(reader);
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        // No thread runs the event loop: there are no wake-ups.
        let device = Device::with(File::from(reader), &Driver::new().unwrap()).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut ports = Vec::new();
        for port in [7_u32, 8] {
            writer.write_all(&port.to_ne_bytes()).unwrap();
            assert!(device.poll_ports(&mut cx, &mut ports).is_ready(), "port {port} is lost");
        }
        assert_eq!(ports, [7, 8].map(EvtchnPort));
        assert!(device.poll_ports(&mut cx, &mut ports).is_pending());
    }
}
