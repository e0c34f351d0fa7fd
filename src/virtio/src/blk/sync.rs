//! A disk's requests, one after the other: straight between file and guest memory.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::{Disk, Failure, command::Command, store::Store};
use crate::{
    active::Active,
    device::{Fault, Progress},
    request::Request,
};

/// Requests handled before the worker looks for other events.
pub(super) const BUDGET: usize = 8;

/// One turn of queue `index`.
pub(super) fn serve(
    store: &mut Store,
    disk: &Disk,
    active: &mut Active,
    index: usize,
    write_through: bool,
) -> Result<Progress, Fault> {
    let counters = Arc::clone(active.counters());
    active.serve(index, BUDGET, |request| {
        let (status, written) = answer(store, disk, request, write_through)?;
        if status != VIRTIO_BLK_S_OK as u8 {
            counters.error();
        }
        Ok(Some(written))
    })
}

/// Does `request`, writes its status, and returns that and the number of bytes written.
fn answer(
    store: &mut Store,
    disk: &Disk,
    request: &Request<'_>,
    write_through: bool,
) -> Result<(u8, u32), Fault> {
    let result = match Command::read(request, disk)? {
        Ok(command) => execute(store, disk, command, request, write_through),
        Err(failure) => Err(failure),
    };
    let (status, written) = match result {
        Ok(written) => (VIRTIO_BLK_S_OK as u8, written),
        Err(failure) => (failure.status(), 0),
    };
    let status_at = request.writable.bytes().saturating_sub(1);
    if !request.writable.write(status_at, &[status]) {
        return Err(Fault::Request("has no room for its status"));
    }
    Ok((status, u32::try_from(written).unwrap_or(0).saturating_add(1)))
}

/// Returns the number of bytes written to the request's data buffers.
fn execute(
    store: &mut Store,
    disk: &Disk,
    command: Command,
    request: &Request<'_>,
    write_through: bool,
) -> Result<usize, Failure> {
    match command {
        Command::Read { offset, bytes } => {
            store.read(&request.writable, 0..bytes, offset)?;
            return Ok(bytes);
        }
        Command::Identify { bytes } => return disk.identify(request, bytes),
        Command::Flush => {
            store.flush()?;
            return Ok(0);
        }
        Command::Write { offset, data } => store.write(&request.readable, data, offset)?,
        Command::Clear(ranges) => {
            for range in ranges {
                store.clear(range)?;
            }
        }
    }
    if write_through {
        store.flush()?;
    }
    Ok(0)
}
