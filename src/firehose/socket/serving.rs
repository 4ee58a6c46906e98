//! One consumer's session, from its first frame to its last.
//! Promises an end for every client that does not read, does not answer or sends garbage. Backfill and live are the same
//! loop.

use std::pin::pin;

use bytes::Bytes;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::task::yield_now;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::connection::{Connection, Pushed, Wanted};
use super::deadlines::Deadlines;
use super::end::End;
use super::handover::{Record, Subscriber};
use super::server_frames::put_message;
use super::session::Session;
use super::stream::{Opening, Source};

/// Bytes the kernel holds of what it could not send yet. Measured: more is no faster, and a thousand stuck consumers hold it
/// a thousand times.
const UNSENT_BYTES: u32 = 128 << 10;

impl Session {
    /// Serves a consumer until it ends. `received` is what the client sent behind the handshake.
    pub async fn run<S: Source>(self, socket: TcpStream, received: Bytes, opening: Opening<S>) {
        let info = self.registration.info();
        let position = opening.source.position();
        tracing::debug!(id = info.id, remote = %info.remote_addr, agent = info.user_agent, position, "consumer connected");
        if let Err(error) = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES) {
            tracing::debug!(%error, "a consumer's socket holds more than it should");
        }
        let mut connection = Connection::new(socket, opening.source);
        let begun = match opening.greeting {
            Ok(greeting) => {
                let out = &mut connection.pending.out;
                greeting
                    .iter()
                    .for_each(|message| put_message(out, message));
                connection.receive(&received, &self.server.options.metrics)
            }
            Err(refusal) => Err(End::Close(refusal)),
        };
        if begun.is_ok() {
            connection.record = self.record(&connection);
        }
        self.finish(connection, begun).await;
    }

    /// Serves a consumer of the previous process until it ends.
    pub async fn resume<S: Source>(self, connection: Connection<S>) {
        let info = self.registration.info();
        tracing::debug!(id = info.id, remote = %info.remote_addr, agent = info.user_agent, "consumer continues");
        self.finish(connection, Ok(())).await;
    }

    async fn finish<S: Source>(mut self, mut connection: Connection<S>, begun: Result<(), End>) {
        let end = match begun {
            Ok(()) => self.serve(&mut connection).await,
            Err(end) => end,
        };
        let reason = end.reason();
        connection.finish(end, &self).await;
        let info = self.registration.info();
        tracing::debug!(
            id = info.id, remote = %info.remote_addr, events = info.events, bytes = info.bytes, reason,
            "consumer gone"
        );
    }

    /// Records the connection for the next process, where there is a way.
    fn record<S: Source>(&self, connection: &Connection<S>) -> Record {
        let Some(handover) = &self.server.handover else {
            return Record::default();
        };
        let info = self.registration.info();
        let subscriber = Subscriber {
            address: info.remote_addr,
            user_agent: info.user_agent,
            connected_at: info.connected_at,
        };
        let Connection {
            socket,
            source,
            pending,
            ..
        } = connection;
        handover.record(socket, &subscriber, source, pending)
    }

    async fn serve<S: Source>(&mut self, connection: &mut Connection<S>) -> End {
        let options = self.server.options.clone();
        let every = Deadlines::interval(&options);
        let mut checks = interval_at(Instant::now() + every, every);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let closing = self.server.closing.clone();
        let mut closing = pin!(closing.cancelled());
        let mut pinged = Instant::now();
        loop {
            self.wakeups.mark_seen();
            let pushed = match connection.push(self, Wanted::Everything).await {
                Ok(pushed) => pushed,
                Err(end) => return end,
            };
            self.wakeups.set_live(pushed == Pushed::Everything);
            tokio::select! {
                biased;
                () = &mut closing => return connection.park(self).await,
                _ = checks.tick() => {
                    if let Err(reason) = connection.deadlines.check(&options) {
                        return End::Cut(reason);
                    }
                    if pinged.elapsed() >= options.ping_interval {
                        pinged = Instant::now();
                        connection.ping_due = true;
                    }
                }
                readable = connection.readable() => {
                    if let Err(end) = readable.and_then(|()| connection.read(self)) {
                        return end;
                    }
                }
                writable = connection.writable(), if pushed == Pushed::Full => {
                    if let Err(end) = writable {
                        return end;
                    }
                }
                woken = self.wakeups.next(), if pushed == Pushed::Everything => {
                    if woken.is_err() {
                        return connection.park(self).await;
                    }
                }
                () = yield_now(), if pushed == Pushed::YieldTurn => {}
            }
        }
    }
}
