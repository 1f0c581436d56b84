//! Requests that a neighbour carries while the device has no uplink of its own.

use std::{
    fmt,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use ureq::{
    Error,
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::{Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport},
    },
};

use crate::mesh::Detour;

/// Connects through a neighbour, where there is one and the device needs it; whatever comes next in the chain does otherwise.
#[derive(Debug)]
pub(super) struct Carry(pub(super) Detour);

impl Connector<()> for Carry {
    type Out = Carried;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _: Option<()>,
    ) -> Result<Option<Self::Out>, Error> {
        let config = details.config;
        let carried = self.0.open().map(|stream| Carried {
            stream,
            buffers: LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size()),
        });
        Ok(carried)
    }
}

/// Names are looked up by whoever connects: without an uplink nobody answers.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) detour: Detour,
    pub(super) own: DefaultResolver,
}

impl Resolver for Names {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        if !self.detour.is_needed() {
            return self.own.resolve(uri, config, timeout);
        }
        let found = self.own.resolve(uri, config, timeout);
        found.or_else(|_| Ok(self.empty()))
    }
}

/// A connection that a neighbour carries.
pub(super) struct Carried {
    stream: UnixStream,
    buffers: LazyBuffers,
}

/// What the library calls a time-out.
fn named(error: io::Error, timeout: NextTimeout) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Timeout(timeout.reason),
        _ => error.into(),
    }
}

impl Transport for Carried {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let wait = timeout.not_zero().map(|wait| *wait);
        self.stream.set_write_timeout(wait)?;
        let bytes = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream
            .write_all(bytes)
            .map_err(|error| named(error, timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let wait = timeout.not_zero().map(|wait| *wait);
        self.stream.set_read_timeout(wait)?;
        let read = self.stream.read(self.buffers.input_append_buf());
        let amount = read.map_err(|error| named(error, timeout))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    /// Nothing waits to be read on a connection that is used again: bytes or an end mean that it is over.
    fn is_open(&mut self) -> bool {
        let looked = self.stream.set_nonblocking(true).and_then(|()| {
            let read = self.stream.read(&mut [0]);
            self.stream.set_nonblocking(false)?;
            Ok(read)
        });
        matches!(looked, Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl fmt::Debug for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Carried").finish_non_exhaustive()
    }
}
