//! How the uplink gets to its broker: by itself, or carried by a neighbour. What to do is decided by [`mesh_core::way`].

use std::time::Duration;

use mesh_core::way::{Attempt, Path, Wait, Way};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    clock::Monotonic,
    config::Config,
    connection::{ConnectError, Connection, News},
    identity::Tls,
    mesh::{Carriers, Present},
};

/// Somebody who is there answers within this.
const TRY: Duration = Duration::from_secs(4);
/// For a goodbye after a try.
const GOODBYE: Duration = Duration::from_millis(200);

/// Something about the way to the broker has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// What was sent is not answered, or the attempt to connect leads to nothing; and a neighbour could carry it.
    Silent,
    /// The device is carried, and its own way answers again.
    Better,
    /// A neighbour can carry it now.
    Carriers,
}

/// The way to the broker.
pub(crate) struct Passage {
    way: Way,
    attempt: Attempt,
    carriers: Option<Carriers>,
    present: Option<watch::Receiver<Present>>,
    could_carry: bool,
    /// Does the device's own way stand? For its neighbours.
    own: watch::Sender<bool>,
    /// The own way is being tried.
    trying: Option<JoinHandle<bool>>,
    /// Messages that the broker has not taken yet.
    unanswered: u32,
    config: Config,
    tls: Tls,
    clock: Monotonic,
}

impl Passage {
    pub(crate) fn new(
        config: Config,
        tls: Tls,
        carriers: Option<Carriers>,
        own: watch::Sender<bool>,
    ) -> Self {
        let mut way = Way::new();
        Self {
            attempt: way.next(false),
            way,
            present: carriers.as_ref().map(Carriers::subscribe),
            carriers,
            could_carry: false,
            own,
            trying: None,
            unanswered: 0,
            config,
            tls,
            clock: Monotonic::start(),
        }
    }

    /// Is the connection that stands, or is being made, carried by a neighbour?
    pub(crate) fn is_carried(&self) -> bool {
        self.way.path() == Path::Carried
    }

    fn can_carry(&self) -> bool {
        self.carriers.as_ref().is_some_and(Carriers::are_there)
    }

    /// Decides how to connect next, and when.
    pub(crate) fn next(&mut self) -> Wait {
        self.attempt = self.way.next(self.can_carry());
        self.attempt.wait
    }

    /// Starts to connect.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub(crate) fn connect(&mut self) -> Result<Connection, ConnectError> {
        self.way.begun(self.clock.now_ms());
        let carriers = self.carriers.clone();
        let carriers = carriers.filter(|_| self.attempt.path == Path::Carried);
        Connection::open(&self.config, &self.tls, carriers)
    }

    pub(crate) fn up(&mut self) {
        self.unanswered = 0;
        self.way.up(self.clock.now_ms());
        self.own.send_replace(!self.is_carried());
    }

    /// There is no connection any more, or none could be made.
    pub(crate) fn lost(&mut self) {
        self.own.send_replace(false);
        self.way.lost(self.can_carry(), self.clock.now_ms());
    }

    /// A message went out that the broker answers.
    pub(crate) fn sent(&mut self) {
        self.unanswered = self.unanswered.saturating_add(1);
        self.way.sent(self.clock.now_ms());
    }

    /// Something came. That something left is no word of anybody.
    pub(crate) fn heard(&mut self, news: &News) {
        if matches!(news, News::Left) {
            return;
        }
        if matches!(news, News::Taken) {
            self.unanswered = self.unanswered.saturating_sub(1);
        }
        self.way.heard(self.unanswered > 0, self.clock.now_ms());
    }

    /// Waits until something about the way changes; for ever where there is no mesh.
    pub(crate) async fn turn(&mut self) -> Turn {
        loop {
            let can_carry = self.can_carry();
            let silent = self.way.silent_at_ms().filter(|_| can_carry);
            let try_at = self.way.try_at_ms().filter(|_| self.trying.is_none());
            let (clock, trying) = (self.clock, &mut self.trying);
            let at = |ms: Option<u64>| async move {
                match ms {
                    Some(ms) => tokio::time::sleep_until(clock.at(ms)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = at(silent) => {
                    if self.way.is_silent(can_carry, self.clock.now_ms()) {
                        return Turn::Silent;
                    }
                }
                () = at(try_at) => {
                    let (config, tls) = (self.config.clone(), self.tls.clone());
                    self.trying = Some(tokio::spawn(async move { answers(&config, &tls).await }));
                }
                answers = ended(trying) => {
                    self.trying = None;
                    if self.way.tried(answers, self.clock.now_ms()) && self.is_carried() {
                        return Turn::Better;
                    }
                }
                () = changed(&mut self.present) => {
                    let can_carry = self.can_carry();
                    let could_carry = std::mem::replace(&mut self.could_carry, can_carry);
                    if can_carry && !could_carry {
                        return Turn::Carriers;
                    }
                }
            }
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if let Some(trying) = &self.trying {
            trying.abort();
        }
    }
}

async fn ended(trying: &mut Option<JoinHandle<bool>>) -> bool {
    match trying {
        Some(trying) => trying.await.unwrap_or(false),
        None => std::future::pending().await,
    }
}

async fn changed(present: &mut Option<watch::Receiver<Present>>) {
    if let Some(receiver) = present {
        if receiver.changed().await.is_ok() {
            return;
        }
        // The mesh has ended.
        *present = None;
    }
    std::future::pending().await
}

/// Does the broker answer over the device's own way?
async fn answers(config: &Config, tls: &Tls) -> bool {
    let Ok(mut connection) = Connection::probe(config, tls) else {
        return false;
    };
    let answered = tokio::time::timeout(TRY, connection.news()).await;
    let is_up = matches!(answered, Ok(News::Up));
    if is_up {
        connection.close(GOODBYE).await;
    }
    is_up
}
