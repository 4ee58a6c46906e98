//! A PostgreSQL server for one test binary, started from the machine's own programs in a temporary
//! folder, on a unix socket. Where there is none, it says `skipped: …` and gives nothing.
//!
//! The server ends with the test process, however that ends: a shell waits for the end of a pipe
//! that only this process holds, then stops the server by its process id and removes the folder.

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The password of the server's only user.
pub const PASSWORD: &str = "correct-horse";

/// The server's only user.
pub const USER: &str = "relay";

/// Longest time a server may take to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A running server.
pub struct Server {
    sockets: PathBuf,
    /// Holds the pipe whose end stops the server.
    _keeper: Child,
}

impl Server {
    /// The URL of one of its databases, with a password of the caller's choice.
    pub fn url_with_password(&self, database: &str, password: &str) -> String {
        format!(
            "postgres://{USER}:{password}@localhost/{database}?host={}",
            self.sockets.display()
        )
    }

    /// The URL of one of its databases.
    pub fn url(&self, database: &str) -> String {
        self.url_with_password(database, PASSWORD)
    }

    /// A new, empty database; its URL.
    pub async fn database(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut admin = PgConnection::connect(&self.url("postgres"))
            .await
            .expect("the server accepts its user");
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut admin)
            .await
            .expect("a database is created");
        self.url(&name)
    }
}

/// The server of this test binary, started at the first call.
pub fn server() -> Option<&'static Server> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    let server = SERVER.get_or_init(|| match start() {
        Ok(server) => Some(server),
        Err(reason) => {
            println!("skipped: no PostgreSQL server ({reason})");
            None
        }
    });
    if server.is_none() {
        println!("skipped: the PostgreSQL half of this test");
    }
    server.as_ref()
}

fn start() -> Result<Server, String> {
    let programs = programs().ok_or("initdb and postgres are not on this machine")?;
    let owner = unprivileged_user()?;
    let folder = tempfile::Builder::new()
        .prefix("relay-pg-")
        .tempdir()
        .map_err(|error| format!("no temporary folder: {error}"))?
        .keep();
    if let Some((uid, gid)) = owner {
        chown(&folder, Some(uid), Some(gid))
            .map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let started =
        create_cluster(&programs, &folder, owner).and_then(|()| launch(&programs, &folder, owner));
    match started {
        Ok(keeper) => {
            let server = Server {
                sockets: folder.clone(),
                _keeper: keeper,
            };
            wait_until_ready(&server)?;
            Ok(server)
        }
        Err(reason) => {
            // Best effort: it is a temporary folder.
            let _ = fs::remove_dir_all(&folder);
            Err(reason)
        }
    }
}

/// The folder with the server's programs: in PATH, where Debian has them, or where pg_config says.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut debian: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .collect();
    debian.sort();
    folders.extend(debian.into_iter().rev());
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(
            String::from_utf8_lossy(&output.stdout).trim(),
        ));
    }
    folders
        .into_iter()
        .find(|folder| folder.join("initdb").is_file() && folder.join("postgres").is_file())
}

/// PostgreSQL refuses to run as root: then another user's numbers, else none.
fn unprivileged_user() -> Result<Option<(u32, u32)>, String> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd =
        fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
    for name in ["postgres", "nobody"] {
        for line in passwd.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [user, _, uid, gid, ..] = fields[..]
                && user == name
                && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
            {
                return Ok(Some((uid, gid)));
            }
        }
    }
    Err("root may not run it, and there is no user postgres or nobody".to_owned())
}

fn as_user(mut command: Command, owner: Option<(u32, u32)>, folder: &Path) -> Command {
    command.current_dir(folder);
    if let Some((uid, gid)) = owner {
        command.uid(uid).gid(gid);
    }
    command
}

fn create_cluster(programs: &Path, folder: &Path, owner: Option<(u32, u32)>) -> Result<(), String> {
    let password = folder.join("password");
    let mut file = fs::File::create(&password).map_err(|error| error.to_string())?;
    file.write_all(PASSWORD.as_bytes())
        .map_err(|error| error.to_string())?;
    fs::set_permissions(&password, fs::Permissions::from_mode(0o644))
        .map_err(|error| error.to_string())?;
    let mut initdb = Command::new(programs.join("initdb"));
    initdb
        .args([
            "--username",
            USER,
            "--auth",
            "scram-sha-256",
            "--encoding",
            "UTF8",
            "--locale",
            "C",
            "--no-sync",
        ])
        .arg("--pwfile")
        .arg(&password)
        .arg("--pgdata")
        .arg(folder.join("data"));
    let output = as_user(initdb, owner, folder)
        .output()
        .map_err(|error| format!("initdb: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "initdb: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    Ok(())
}

/// Starts the server under a shell that stops it when our end of its standard input closes.
fn launch(programs: &Path, folder: &Path, owner: Option<(u32, u32)>) -> Result<Child, String> {
    const KEEPER: &str = r#"
        "$1/postgres" -D "$2/data" -k "$2" -F -c listen_addresses= -c max_connections=200 >"$2/log" 2>&1 &
        server=$!
        read -r _
        kill -INT "$server"
        wait "$server"
        cd / && rm -rf "$2"
    "#;
    let mut keeper = Command::new("sh");
    keeper
        .args(["-c", KEEPER, "keeper"])
        .arg(programs)
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A Ctrl-C in the terminal ends the test process, and through the pipe the server.
        .process_group(0);
    as_user(keeper, owner, folder)
        .spawn()
        .map_err(|error| format!("sh: {error}"))
}

fn wait_until_ready(server: &Server) -> Result<(), String> {
    let url = server.url("postgres");
    let deadline = Instant::now() + START_TIMEOUT;
    // Its own thread: the caller may be inside a runtime already.
    let ready = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| e.to_string())?;
        runtime.block_on(async {
            loop {
                match PgConnection::connect(&url).await {
                    Ok(_) => return Ok(()),
                    Err(error) if Instant::now() > deadline => return Err(error.to_string()),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        })
    });
    ready
        .join()
        .map_err(|_| "the waiting thread panicked".to_owned())?
}

#[allow(dead_code, reason = "every test binary uses a part of it")]
/// A way to a server over TCP that can be closed and opened, as when the server stops and starts: whoever connects
/// meanwhile is refused.
pub struct Gate {
    address: std::net::SocketAddr,
    socket: PathBuf,
    open: Option<tokio::task::JoinHandle<()>>,
}

#[allow(dead_code, reason = "every test binary uses a part of it")]
impl Gate {
    /// Opens one on a port of its own.
    pub async fn open(server: &Server) -> Self {
        let mut gate = Self {
            address: ([127, 0, 0, 1], 0).into(),
            socket: server.sockets.join(".s.PGSQL.5432"),
            open: None,
        };
        gate.reopen().await;
        gate
    }

    /// The URL of a database, by its URL on the server's own socket.
    pub fn url(&self, url: &str) -> String {
        let (rest, _) = url.split_once('?').expect("a URL with a socket");
        rest.replace("localhost", &self.address.to_string())
    }

    /// Cuts who is connected, and refuses who comes.
    pub fn close(&mut self) {
        if let Some(open) = self.open.take() {
            open.abort();
        }
    }

    /// Lets through again, on the same port.
    pub async fn reopen(&mut self) {
        let listener = tokio::net::TcpSocket::new_v4().expect("a socket");
        listener.set_reuseaddr(true).expect("an option");
        listener.bind(self.address).expect("the port is free");
        let listener = listener.listen(64).expect("the port is free");
        self.address = listener.local_addr().expect("an address");
        let socket = self.socket.clone();
        self.open = Some(tokio::spawn(async move {
            // Ended with this task.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((mut client, _)) = listener.accept().await else {
                    return;
                };
                let socket = socket.clone();
                connections.spawn(async move {
                    let Ok(mut server) = tokio::net::UnixStream::connect(socket).await else {
                        return;
                    };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        }));
    }
}
