//! What an operator without Nix installs: the units of contrib/systemd are those that the NixOS module renders, the
//! configuration beside them is accepted, and the container image is built from what the Nix package is built from.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn the_units_are_derived_from_the_rendered_ones() {
    let folder = tempfile::tempdir().unwrap();
    let script = root().join("contrib/systemd/derive");
    let done = Command::new("bash")
        .args([script.as_path(), folder.path()])
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let mut derived = 0;
    for entry in fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        let name = format!("contrib/systemd/{}", entry.file_name().to_str().unwrap());
        let wanted = fs::read_to_string(entry.path()).unwrap();
        assert!(
            read(&name) == wanted,
            "{name} is out of date: contrib/systemd/derive writes it"
        );
        derived += 1;
    }
    // The service, three sockets, the slice, the kernel settings.
    assert_eq!(derived, 6);
}

#[test]
fn the_example_configuration_is_accepted() {
    let checked = Command::new(env!("CARGO_BIN_EXE_atproto-relay"))
        .args(["check-config", "--config"])
        .arg(root().join("contrib/systemd/config.toml"))
        .env_clear()
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let said = String::from_utf8(checked.stdout).unwrap();
    assert!(
        said.contains("data_dir = \"/var/lib/atproto-relay\""),
        "{said}"
    );
}

#[test]
fn the_container_image_is_built_from_what_the_package_is_built_from() {
    let package = read("nixos/package.nix");
    let sources = package.split_once("fileset.unions [").unwrap().1;
    let sources = sources.split_once(']').unwrap().0;
    let of_package: BTreeSet<&str> = sources
        .lines()
        .filter_map(|line| line.trim().strip_prefix("../"))
        .collect();
    let container = read("Containerfile");
    let of_container: BTreeSet<&str> = container
        .lines()
        .filter_map(|line| line.strip_prefix("COPY "))
        .filter(|line| !line.starts_with("--"))
        .flat_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            words[..words.len() - 1].to_vec()
        })
        .map(|source| source.trim_end_matches('/'))
        .collect();
    assert_eq!(of_container, of_package);
}
