//! From a launch to a communicator.

use super::control::Timeouts;
use super::host::HostCommunicator;
use super::launch::Launch;
use super::nccl::NcclCommunicator;
use super::rendezvous::{self, Luggage};
use super::single::Single;
use super::{Communicator, Result};
use crate::signal::StopFlag;
use std::sync::Arc;
use stickbreak_tensor::Device;

/// Meets the other ranks of a launch and connects their devices: one rank is alone, ranks on GPUs use NCCL, ranks on CPUs
/// the connections that they met over.
///
/// `identity` is name and value of everything that has to be the same for all, such as a hash of the config; a rank that
/// differs is named with both values. Call it before anything that one rank alone could fail at for long.
///
/// # Errors
/// If the ranks do not find each other in time (naming the missing ones), differ, or their devices cannot be connected.
pub fn connect(
    launch: &Launch,
    device: Device,
    identity: &[(String, String)],
    timeouts: Timeouts,
) -> Result<Arc<dyn Communicator>> {
    connect_unless(launch, device, identity, timeouts, &StopFlag::new())
}

/// [`connect`], unless `stop` is set while others are waited for.
///
/// # Errors
/// As [`connect`], or if it was stopped.
pub fn connect_unless(
    launch: &Launch,
    device: Device,
    identity: &[(String, String)],
    timeouts: Timeouts,
    stop: &StopFlag,
) -> Result<Arc<dyn Communicator>> {
    let master = match &launch.master {
        Some(master) if launch.ranks > 1 => master,
        _ => return Ok(Arc::new(Single)),
    };
    match device {
        Device::Cpu => {
            let luggage = Luggage { identity, stop: stop.clone(), ..Luggage::default() };
            let met = rendezvous::meet(launch, master, luggage, timeouts)?;
            Ok(Arc::new(HostCommunicator::new(met.control)))
        }
        Device::Cuda(ordinal) => {
            Ok(Arc::new(NcclCommunicator::connect(launch, master, ordinal, identity, timeouts, stop)?))
        }
    }
}
