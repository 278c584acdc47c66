//! Order between queues: a mark behind a queue's work, which another queue or the host can wait for.

use super::device::driver;
use super::queue::Queue;
use crate::Result;
use cudarc::driver::CudaEvent;
use cudarc::driver::result::stream::get_priority_range;

/// A mark behind the work that a queue held when it was set.
#[derive(Debug)]
pub struct Event {
    event: CudaEvent,
}

impl Queue {
    /// A second queue on the same device, whose work runs beside this one's, and before it where both could.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn beside(&self) -> Result<Self> {
        self.gpu().bind()?;
        // The least number is the highest priority.
        let (_, highest) = get_priority_range().map_err(driver("asking for the priorities of streams"))?;
        let stream = self.gpu().context().new_stream_with_priority(highest).map_err(driver("making a stream"))?;
        Ok(Self::new(self.gpu().clone(), stream))
    }

    /// Sets a mark behind all work that the queue holds now.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn mark(&self) -> Result<Event> {
        self.gpu().bind()?;
        Ok(Event { event: self.stream().record_event(None).map_err(driver("recording an event"))? })
    }

    /// Lets work that is put on this queue from now on begin only once a mark of any queue of the device is reached. The
    /// host does not wait.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn wait_for(&self, mark: &Event) -> Result<()> {
        self.gpu().bind()?;
        self.stream().wait(&mark.event).map_err(driver("ordering two streams"))
    }
}

impl Event {
    /// Whether all work before the mark is done.
    ///
    /// # Errors
    /// If work on the device failed.
    pub fn is_reached(&self) -> Result<bool> {
        self.event.context().bind_to_thread().map_err(driver("binding a device"))?;
        self.event.try_is_complete().map_err(driver("asking for an event"))
    }
}
