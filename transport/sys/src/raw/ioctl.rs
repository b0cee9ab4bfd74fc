//! Calls of the Xen devices.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

use crate::raw::Mapping;

/// One call. The helpers of rustix drop the return value, which is the bound port of an event channel.
struct Call<'a, const N: usize> {
    opcode: Opcode,
    argument: &'a mut [u32; N],
}

// SAFETY: the pointer is that of a live array in which every bit pattern is valid. `IS_MUTATING` says
// that the kernel may write to it; `run` checks the size.
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
/// Addresses in the argument must point to memory that the call may read and write.
unsafe fn run<const N: usize>(
    device: impl AsFd,
    opcode: Opcode,
    argument: &mut [u32; N],
) -> io::Result<i32> {
    // Linux puts the size of the argument into the number of the call.
    let size = opcode as usize >> 16 & 0x3fff;
    assert!(size <= size_of_val(argument), "call {opcode:#x} takes {size} bytes");
    // SAFETY: the kernel accesses `size` bytes of the argument, which is longer and initialised; the
    // caller guarantees the addresses in it.
    Ok(unsafe { rustix::ioctl::ioctl(device, Call { opcode, argument })? })
}

/// Calls the event channel or the grant device, whose arguments are words; returns the value of the
/// call.
pub(crate) fn call<const N: usize>(
    device: impl AsFd,
    opcode: Opcode,
    argument: &mut [u32; N],
) -> io::Result<i32> {
    let group = opcode >> 8 & 0xff;
    assert!(group == u32::from(b'E') || group == u32::from(b'G'), "call {opcode:#x}");
    // SAFETY: the calls of `xen.rs` take no addresses.
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

/// Makes a hypercall whose last argument is the address of `buffer`, after the command if it takes one;
/// returns the value of the call.
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
    // SAFETY: the only address is that of the buffer, which lives until the call returns. It is a page,
    // longer than the arguments of the hypercalls of `xen.rs`, which contain no addresses.
    unsafe { run(privcmd, HYPERCALL, &mut argument) }
}

/// Maps a page of a domain by its frame number.
///
/// # Errors
///
/// Fails with the error of the hypervisor, for example `ENOENT` if the frame is paged out.
pub fn map_frame(privcmd: impl AsFd + Copy, domid: u16, gfn: u64) -> io::Result<Mapping> {
    let page = Mapping::shared(privcmd, 0, 4096)?;
    let (mut frames, mut errors) = ([gfn], [0_i32]);
    let [target, array, error] = [
        page.address(),
        frames.as_mut_ptr().expose_provenance() as u64,
        errors.as_mut_ptr().expose_provenance() as u64,
    ]
    .map(halves);
    let mut argument =
        [1, domid.into(), target[0], target[1], array[0], array[1], error[0], error[1]];
    // SAFETY: the page is an unused mapping of this device; the arrays have one entry each, as the
    // argument says.
    unsafe { run(privcmd, MMAPBATCH_V2, &mut argument)? };
    match errors[0] {
        0 => Ok(page),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
