//! Calls of devices.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

use crate::raw::Mapping;

/// One call. rustix's own helpers drop the number that a call returns, which is the port that an
/// event channel was bound to.
struct Call<'a, const N: usize> {
    opcode: Opcode,
    argument: &'a mut [u32; N],
}

// SAFETY: the pointer is that of a live array, in which every bit pattern is a value; that the
// kernel may write to it is said by `IS_MUTATING`, and that it stays inside is checked by `run`.
unsafe impl<const N: usize> Ioctl for Call<'_, N> {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut c_void,
    ) -> Result<i32, rustix::io::Errno> {
        Ok(output)
    }
}

/// # Safety
///
/// Addresses in the argument must be those of memory that the call may use as it does.
unsafe fn run<const N: usize>(
    device: impl AsFd,
    opcode: Opcode,
    argument: &mut [u32; N],
) -> io::Result<i32> {
    // Linux puts the size of the argument into the number of the call.
    let size = opcode as usize >> 16 & 0x3fff;
    assert!(size <= size_of_val(argument), "call {opcode:#x} takes {size} bytes");
    // SAFETY: the kernel reads and writes `size` bytes of the argument, which are there and
    // initialised; the caller answers for what addresses in it point to.
    Ok(unsafe { rustix::ioctl::ioctl(device, Call { opcode, argument })? })
}

/// Calls the event channel or the grant device, whose arguments are words; what the call returns.
pub(crate) fn call<const N: usize>(
    device: impl AsFd,
    opcode: Opcode,
    argument: &mut [u32; N],
) -> io::Result<i32> {
    let group = opcode >> 8 & 0xff;
    assert!(group == u32::from(b'E') || group == u32::from(b'G'), "call {opcode:#x}");
    // SAFETY: the calls of these two devices that are in use take no addresses.
    unsafe { run(device, opcode, argument) }
}

/// `IOCTL_PRIVCMD_HYPERCALL` and `IOCTL_PRIVCMD_MMAPBATCH_V2` of `xen/privcmd.h`.
const HYPERCALL: Opcode = 0x0030_5000;
const MMAPBATCH_V2: Opcode = 0x0020_5004;

/// The low and the high half of a number.
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

/// A hypercall whose last argument lies in `buffer`, after the number of a command if it takes one;
/// what it returns.
pub(crate) fn hypercall(
    privcmd: impl AsFd,
    number: u32,
    command: Option<u32>,
    buffer: &Mapping,
) -> io::Result<i32> {
    let [low, high] = halves(buffer.address());
    let mut argument = [0; 12];
    match command {
        Some(command) => argument[..6].copy_from_slice(&[number, 0, command, 0, low, high]),
        None => argument[..4].copy_from_slice(&[number, 0, low, high]),
    }
    // SAFETY: the only address is that of the buffer, which is a whole page and so longer than
    // every argument of the hypercalls in use, and lives until the call returns.
    unsafe { run(privcmd, HYPERCALL, &mut argument) }
}

/// Maps a page of a domain by the number of its frame.
pub fn map_frame(privcmd: impl AsFd + Copy, domid: u16, gfn: u64) -> io::Result<Mapping> {
    let page = Mapping::shared(privcmd, 0, 4096)?;
    let (mut frames, mut errors) = ([gfn], [0_i32]);
    let [place, array, error] = [
        page.address(),
        frames.as_mut_ptr().expose_provenance() as u64,
        errors.as_mut_ptr().expose_provenance() as u64,
    ]
    .map(halves);
    let mut argument =
        [1, domid.into(), place[0], place[1], array[0], array[1], error[0], error[1]];
    // SAFETY: the page is a mapping of this device that nobody has looked at yet, and the arrays
    // have one entry each, as the argument says.
    unsafe { run(privcmd, MMAPBATCH_V2, &mut argument)? };
    match errors[0] {
        0 => Ok(page),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
