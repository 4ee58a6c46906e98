//! The hosts' numbers and names, in a file beside the log's segments, which contain the numbers: where the database is
//! lost or older than the log, the host of each event in the log is still known. Holds nothing else of a host.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::registry::Hosts;
use crate::dial::{Guard, HostName};
use crate::store::{HostId, HostRow};

/// Name of the file: lines of number, scheme, name, checksum.
const FILE: &str = "hosts";
const FILE_MODE: u32 = 0o640;
const TLS: &str = "wss";
const PLAIN: &str = "ws";

/// A host's name, and whether it is reached over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `host` or `host:port`.
    pub hostname: String,
    pub tls: bool,
}

impl Name {
    /// The name in a row of the database.
    pub fn of(row: &HostRow) -> Name {
        Name::new(&row.hostname, row.tls)
    }

    /// The host of this name, whatever the rules for dialling are now.
    pub fn host(&self) -> Option<HostName> {
        HostName::from_parts(&self.hostname, self.tls, &Guard::new(true)).ok()
    }

    /// The name of a host, with its port if it has one.
    pub fn new(hostname: &str, tls: bool) -> Name {
        Name {
            hostname: hostname.to_owned(),
            tls,
        }
    }
}

/// The file and its contents.
#[derive(Debug)]
pub struct Roster {
    file: File,
    hosts: HashMap<HostId, Name>,
}

impl Roster {
    /// Opens the roster in the log's folder.
    pub fn open(folder: &Path) -> io::Result<Roster> {
        let hosts = read(folder)?;
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(FILE_MODE)
            .open(folder.join(FILE))?;
        Ok(Roster { file, hosts })
    }

    /// The hosts that were ever recorded.
    pub fn hosts(&self) -> &HashMap<HostId, Name> {
        &self.hosts
    }

    /// Records the hosts of the registry that are not recorded yet; on disk when it returns.
    pub fn record_new(&mut self, hosts: &Hosts) -> io::Result<()> {
        if hosts.count() <= self.hosts.len() {
            return Ok(());
        }
        let known = hosts.list();
        let names = known
            .iter()
            .map(|host| (host.id(), Name::new(host.name(), host.host().tls())));
        self.record(names)
    }

    /// Records those of the hosts that are not recorded yet; on disk when it returns.
    pub fn record(&mut self, hosts: impl IntoIterator<Item = (HostId, Name)>) -> io::Result<()> {
        let new: Vec<_> = hosts
            .into_iter()
            .filter(|(id, name)| self.hosts.get(id) != Some(name))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        // A line torn by a crash must not swallow the next.
        let lines: String = new
            .iter()
            .map(|(id, name)| format!("\n{}\n", line(*id, name)))
            .collect();
        self.file.write_all(lines.as_bytes())?;
        self.file.sync_data()?;
        self.hosts.extend(new);
        Ok(())
    }
}

/// The hosts recorded in the log's folder, which may be in use; none where there is no roster.
pub fn read(folder: &Path) -> io::Result<HashMap<HostId, Name>> {
    let text = match fs::read(folder.join(FILE)) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    // A line torn by a crash is of a host none of whose events is in the log.
    Ok(text.lines().filter_map(from_line).collect())
}

fn line(id: HostId, name: &Name) -> String {
    let scheme = if name.tls { TLS } else { PLAIN };
    let text = format!("{id} {scheme} {}", name.hostname);
    format!("{text} {:08x}", crc32fast::hash(text.as_bytes()))
}

fn from_line(line: &str) -> Option<(HostId, Name)> {
    let (text, crc) = line.rsplit_once(' ')?;
    if u32::from_str_radix(crc, 16).ok()? != crc32fast::hash(text.as_bytes()) {
        return None;
    }
    let mut parts = text.splitn(3, ' ');
    let id = HostId(parts.next()?.parse().ok()?);
    let tls = parts.next()? == TLS;
    let hostname = parts.next()?.to_owned();
    Some((id, Name { hostname, tls }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(id: u32, tls: bool) -> (HostId, Name) {
        let hostname = format!("pds{id}.example.com:44{id}");
        (HostId(id), Name { hostname, tls })
    }

    #[test]
    fn the_domain_is_the_name_without_a_port() {
        for (hostname, domain) in [
            ("pds.example.com", "pds.example.com"),
            ("pds.example.com:443", "pds.example.com"),
            ("[::1]:2583", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            let host = Name::new(hostname, true).host().unwrap();
            assert_eq!(host.domain(), domain);
        }
    }

    #[test]
    fn recorded_hosts_read_back_whatever_follows_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let mut roster = Roster::open(folder.path()).unwrap();
        roster.record([host(1, true), host(2, false)]).unwrap();
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        roster.record([host(2, false), host(1, true)]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole, "nothing is recorded twice");
        for cut in whole.len() / 2 + 1..whole.len() - 1 {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut torn = Roster::open(folder.path()).unwrap();
            assert_eq!(torn.hosts(), &HashMap::from([host(1, true)]), "{cut}");
            torn.record([host(3, true)]).unwrap();
            let again = Roster::open(folder.path()).unwrap();
            assert_eq!(
                again.hosts(),
                &HashMap::from([host(1, true), host(3, true)])
            );
        }
    }
}
