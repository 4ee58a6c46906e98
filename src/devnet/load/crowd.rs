//! Thousands of cheap consumers: they subscribe, read and discard, the slow ones little at a time. The watcher checks the
//! stream, they do not.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// Connections made at a time, so that no backlog overflows.
const AT_A_TIME: usize = 32;
/// How long a consumer may take to be let in.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes a quick consumer reads at a time.
const QUICK_READ: usize = 64 << 10;
/// Bytes a slow consumer reads in a second: less than a single event.
const SLOW_READ: usize = 1 << 10;
/// Receive buffer of a slow consumer, so that the kernel does not read for it.
const SLOW_BUFFER: u32 = 4 << 10;
/// Longest answer to a handshake.
const MAX_ANSWER: usize = 4 << 10;

/// Why a consumer did not get in.
#[derive(Debug, thiserror::Error)]
pub enum CrowdError {
    #[error("`{0}` is not ws://ADDRESS:PORT")]
    Address(String),
    #[error(
        "consumer {number} cannot connect to {address}: {source}; a process may need more open files than \
         it is allowed (ulimit -n)"
    )]
    Connect {
        number: usize,
        address: SocketAddr,
        source: io::Error,
    },
    #[error("consumer {number} was not let in: {answer}")]
    Refused { number: usize, answer: String },
}

/// Connected consumers; dropping it ends them.
#[derive(Debug)]
pub struct Crowd {
    /// Aborts the tasks when dropped.
    _tasks: JoinSet<()>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: AtomicU64,
    cut: AtomicUsize,
}

impl Crowd {
    /// Connects `consumers` to a relay at `ws://address:port`, of which `slow` read too little.
    pub async fn start(firehose: &str, consumers: usize, slow: usize) -> Result<Crowd, CrowdError> {
        let address: SocketAddr = firehose
            .strip_prefix("ws://")
            .and_then(|address| address.parse().ok())
            .ok_or_else(|| CrowdError::Address(firehose.to_owned()))?;
        let state = Arc::new(State::default());
        let mut tasks = JoinSet::new();
        let numbers: Vec<usize> = (0..consumers).collect();
        for numbers in numbers.chunks(AT_A_TIME) {
            let connecting = numbers.iter().map(|number| async move {
                let slow = *number < slow;
                Ok((connect(*number, address, slow).await?, slow))
            });
            let connected = futures_util::future::try_join_all(connecting).await?;
            for (stream, slow) in connected {
                let state = state.clone();
                tasks.spawn(async move {
                    let end = if slow {
                        trickle(stream, &state).await
                    } else {
                        read(stream, &state).await
                    };
                    tracing::debug!(slow, ?end, "a consumer of the crowd was cut");
                    state.cut.fetch_add(1, Ordering::Relaxed);
                });
            }
        }
        Ok(Crowd {
            _tasks: tasks,
            state,
        })
    }

    /// Bytes read by all of them.
    pub fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::Relaxed)
    }

    /// How many of them the relay has cut.
    pub fn cut(&self) -> usize {
        self.state.cut.load(Ordering::Relaxed)
    }
}

async fn connect(number: usize, address: SocketAddr, slow: bool) -> Result<TcpStream, CrowdError> {
    let failed = |source| CrowdError::Connect {
        number,
        address,
        source,
    };
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    };
    let socket = socket.map_err(failed)?;
    if slow {
        socket.set_recv_buffer_size(SLOW_BUFFER).map_err(failed)?;
    }
    let shake = async {
        let mut stream = socket.connect(address).await.map_err(failed)?;
        let request = format!(
            "GET /xrpc/com.atproto.sync.subscribeRepos HTTP/1.1\r\nhost: {address}\r\n\
             connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        let answer = head(&mut stream).await.map_err(failed)?;
        if answer.starts_with("HTTP/1.1 101") {
            return Ok(stream);
        }
        let answer = answer.lines().next().unwrap_or_default().to_owned();
        Err(CrowdError::Refused { number, answer })
    };
    let late = || failed(io::ErrorKind::TimedOut.into());
    tokio::time::timeout(PATIENCE, shake)
        .await
        .unwrap_or_else(|_| Err(late()))
}

/// The head of an HTTP answer, up to the empty line and not a byte more.
async fn head(stream: &mut TcpStream) -> io::Result<String> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        if bytes.len() == MAX_ANSWER {
            return Err(io::ErrorKind::InvalidData.into());
        }
        bytes.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads until the connection ends.
async fn read(mut stream: TcpStream, state: &State) -> io::Result<()> {
    let mut buffer = vec![0; QUICK_READ];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        state.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Reads a little every second.
async fn trickle(mut stream: TcpStream, state: &State) -> io::Result<()> {
    let mut buffer = [0; SLOW_READ];
    let mut seconds = tokio::time::interval(Duration::from_secs(1));
    loop {
        seconds.tick().await;
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        state.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }
}
