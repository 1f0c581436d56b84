//! How the agent asks the coordinator over HTTP, whatever it asks for.

mod carried;

use std::{
    io::{Read, Write},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};
use ureq::{
    Error,
    unversioned::{
        resolver::DefaultResolver,
        transport::{
            Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, TcpConnector,
            Transport, TransportAdapter,
        },
    },
};

use self::carried::{Carry, Names};
use crate::{
    identity::{Tls, is_about_certificates},
    mesh::Detour,
    trouble::explained,
};

/// The longest head of an answer in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// How long each part of an exchange may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// To connect.
    pub(crate) connect: Duration,
    /// Until the answer begins.
    pub(crate) answer: Duration,
    /// For the answer's body.
    pub(crate) body: Duration,
    /// For everything together, where that is bounded.
    pub(crate) whole: Option<Duration>,
}

/// Follows no redirect and no proxy, and takes any status as an answer. Each new connection to an `https` address is made
/// with what the device's identity is then.
pub(crate) fn agent(patience: Patience, tls: &Tls) -> ureq::Agent {
    make(patience, Wrap::Identity(tls.clone()), tls.detour())
}

/// The same, with these settings of TLS only.
pub(crate) fn agent_with(
    patience: Patience,
    config: Arc<ClientConfig>,
    detour: Detour,
) -> ureq::Agent {
    make(patience, Wrap::Fixed(config), detour)
}

fn make(patience: Patience, wrap: Wrap, detour: Detour) -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        // What the environment says about proxies is for other programs.
        .proxy(None)
        .user_agent(concat!("lacewing-edge-agent/", env!("CARGO_PKG_VERSION")))
        .max_response_header_size(MAX_HEAD)
        .timeout_connect(Some(patience.connect))
        .timeout_recv_response(Some(patience.answer))
        .timeout_recv_body(Some(patience.body))
        .timeout_global(patience.whole)
        .build();
    let carry = Carry(detour.clone());
    let connector = ().chain(carry).chain(TcpConnector::default()).chain(wrap);
    let own = DefaultResolver::default();
    ureq::Agent::with_parts(config, connector, Names { detour, own })
}

/// Wraps a connection in TLS where the address asks for it. The client library has a connector of its own, but that one
/// takes neither a clock nor a certificate that changes.
#[derive(Debug)]
enum Wrap {
    Identity(Tls),
    Fixed(Arc<ClientConfig>),
}

impl Wrap {
    fn config(&self) -> Result<Arc<ClientConfig>, Error> {
        match self {
            Self::Identity(tls) => tls.config().map_err(Error::Tls),
            Self::Fixed(config) => Ok(Arc::clone(config)),
        }
    }
}

impl<In: Transport> Connector<In> for Wrap {
    type Out = Either<In, Encrypted>;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        let Some(transport) = chained else {
            return Ok(None);
        };
        if !details.needs_tls() {
            return Ok(Some(Either::A(transport)));
        }
        let host = details.uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::Tls("the coordinator's name is no name of a host"))?;
        let mut connection = ClientConnection::new(self.config()?, name)?;
        let boxed: Box<dyn Transport> = Box::new(transport);
        let mut socket = TransportAdapter::new(boxed, Arc::clone(&details.current_time));
        socket.set_timeout(details.timeout);
        if let Err(error) = connection.complete_io(&mut socket) {
            if let Self::Identity(tls) = self
                && is_about_certificates(&error)
            {
                tls.doubt();
            }
            return Err(explained(error).into());
        }
        let buffers = LazyBuffers::new(
            details.config.input_buffer_size(),
            details.config.output_buffer_size(),
        );
        Ok(Some(Either::B(Encrypted {
            buffers,
            stream: StreamOwned::new(connection, socket),
        })))
    }
}

/// A connection within TLS.
struct Encrypted {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl Transport for Encrypted {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.get_mut().set_timeout(timeout);
        let output = self.buffers.output();
        let bytes = output.get(..amount).unwrap_or_default();
        Ok(self.stream.write_all(bytes)?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.get_mut().set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl std::fmt::Debug for Encrypted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encrypted").finish_non_exhaustive()
    }
}
