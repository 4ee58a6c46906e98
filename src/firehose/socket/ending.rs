//! How connections end: left to the next process, cut, or closed with a close frame.
//! Promises that a close frame stands between two events, and that nobody waits for long for a client to answer it.

use std::future::poll_fn;
use std::net::Shutdown;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};

use super::close_codes::{NORMAL, SERVICE_RESTART};
use super::connection::{Connection, Pushed, Wanted};
use super::end::{End, LOST};
use super::server_frames::{put_close, put_message};
use super::session::Session;
use super::stream::{Closing, Source};

/// How long a connection that is being closed may take to send the rest and to answer.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);
/// The same while the relay shuts down, which must not take long: a slow client reconnects with its cursor.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the event that is begun may take to go out before the next process is left to send the rest.
const PARKING_TIMEOUT: Duration = Duration::from_millis(300);

impl<S: Source> Connection<S> {
    /// How the connection ends when the relay shuts down: it is left to the next process, if that will get the socket, after
    /// a whole event where the client takes it.
    pub async fn park(&mut self, session: &Session) -> End {
        if !self.record.is_stored() {
            return End::Close(Closing::new(SERVICE_RESTART, "the relay is closing"));
        }
        let rest = async {
            while self.push(session, Wanted::LastFrames).await? == Pushed::Full {
                self.writable().await?;
            }
            Ok(())
        };
        match timeout(PARKING_TIMEOUT, rest).await {
            Ok(Err(end)) => end,
            Ok(Ok(())) | Err(_) => End::Parked(std::mem::take(&mut self.record)),
        }
    }

    /// Waits until the socket takes bytes.
    pub async fn writable(&self) -> Result<(), End> {
        let writable = poll_fn(|cx| self.socket.poll_write_ready(cx)).await;
        writable.map_err(|_| End::Cut(LOST))
    }

    /// Ends the connection.
    pub async fn finish(&mut self, end: End, session: &Session) {
        // From here on the connection is not handed over. Systemd has the socket as well, so that a cut must be explicit.
        let record = std::mem::take(&mut self.record);
        if record.is_kept() && matches!(end, End::Cut(_)) {
            // The connection may have ended by itself.
            let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        }
        drop(record);
        let inside = self.is_inside_event();
        let out = &mut self.pending.out;
        let closed_by_client = match end {
            End::Cut(_) => return,
            End::Parked(record) => return record.park(!inside && out.is_empty()),
            End::Closed(code) => {
                put_close(out, code.unwrap_or(NORMAL), "");
                true
            }
            End::Close(Closing { code, reason, last }) => {
                if let Some(last) = last {
                    put_message(out, &last);
                }
                put_close(out, code, reason);
                false
            }
        };
        (self.pending.pong, self.ping_due) = (None, false);
        let hurried = async {
            session.server.closing.cancelled().await;
            sleep(SHUTDOWN_TIMEOUT).await;
        };
        tokio::select! {
            _ = timeout(CLOSING_TIMEOUT, self.close(session, closed_by_client)) => {}
            () = hurried => {}
        }
    }

    async fn close(&mut self, session: &Session, closed_by_client: bool) -> Result<(), End> {
        // Reads on meanwhile: a client that waits for us to read would never read what we send.
        let mut reading = !closed_by_client;
        loop {
            let full = self.push(session, Wanted::LastFrames).await? == Pushed::Full;
            if !full && !reading {
                break;
            }
            tokio::select! {
                writable = self.writable(), if full => writable?,
                readable = self.readable(), if reading => {
                    readable?;
                    // After garbage only the end of the stream means anything.
                    match self.read(session) {
                        Err(End::Closed(_) | End::Cut(_)) => reading = false,
                        _ => self.pending.pong = None,
                    }
                }
            }
        }
        self.socket.shutdown().await.map_err(|_| End::Cut(LOST))
    }
}
