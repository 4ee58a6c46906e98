//! The layers of `src/`: a room uses only the rooms below it, and no two files need each other. The order of the rooms is
//! the list in the architecture page.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// The page with the list of the rooms, from the ground floor up. Each may use those before it.
const PAGE: &str = "docs/design/architecture.md";

/// A path in code: `crate::store::Store` is `["store", "Store"]`.
type Segments = Vec<String>;

struct File {
    path: PathBuf,
    /// Its module: `["store", "rows"]`.
    module: Segments,
    /// Its code, without comments, strings and unit tests.
    code: String,
    /// What it makes available under another path: name to the path that it stands for.
    reexports: HashMap<String, Segments>,
    /// Paths that it names.
    uses: BTreeSet<Segments>,
}

impl File {
    fn room(&self) -> &str {
        &self.module[0]
    }
}

/// Code without comments, string contents and what follows the first `#[cfg(test)]` on the outermost level.
fn strip(text: &str) -> String {
    let tests = ["\n#[cfg(test)]\nmod ", "\n#[cfg(all(test"];
    let end = tests.iter().filter_map(|begin| text.find(begin)).min();
    let text = &text[..end.unwrap_or(text.len())];
    let mut code = String::with_capacity(text.len());
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default();
        for (index, part) in line.split('"').enumerate() {
            if index % 2 == 0 {
                code.push_str(part);
            }
        }
        code.push('\n');
    }
    code
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rooms, from the ground floor up.
fn rooms() -> Vec<String> {
    let page = fs::read_to_string(root().join(PAGE)).unwrap();
    let (_, list) = page.split_once("```rooms\n").unwrap();
    let (list, _) = list.split_once("```").unwrap();
    list.split([',', '\n'])
        .map(str::trim)
        .filter(|room| !room.is_empty())
        .map(str::to_owned)
        .collect()
}

fn is_name(text: char) -> bool {
    text.is_ascii_alphanumeric() || text == '_'
}

/// The paths of a use tree, each with the name that it has here: `a::{b, c as d}` is `a::b` as b, and `a::c` as d.
fn use_tree(tree: &str, prefix: &[String], found: &mut Vec<(String, Segments)>) {
    let tree = tree.trim();
    if let Some((head, rest)) = tree.split_once('{') {
        let mut prefix = prefix.to_vec();
        prefix.extend(
            head.split("::")
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .map(str::to_owned),
        );
        let rest = &rest[..rest.rfind('}').unwrap_or(rest.len())];
        let (mut depth, mut start) = (0, 0);
        for (at, letter) in rest.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    use_tree(&rest[start..at], &prefix, found);
                    start = at + 1;
                }
                _ => {}
            }
        }
        use_tree(&rest[start..], &prefix, found);
        return;
    }
    let (path, alias) = match tree.split_once(" as ") {
        Some((path, alias)) => (path, Some(alias.trim())),
        None => (tree, None),
    };
    let mut segments = prefix.to_vec();
    segments.extend(
        path.split("::")
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned),
    );
    if segments.last().is_some_and(|last| last == "self") {
        segments.pop();
    }
    if let Some(last) = segments.last() {
        let name = alias.map_or_else(|| last.clone(), str::to_owned);
        if !tree.is_empty() {
            found.push((name, segments));
        }
    }
}

/// A path from the crate's root, of one as it is written in a module; `None` where it leads out of the crate.
fn absolute(path: &[String], module: &[String], children: &BTreeSet<String>) -> Option<Segments> {
    let mut base = module.to_vec();
    let mut rest = path;
    match path.first()?.as_str() {
        "crate" | "atproto_relay" => {
            base.clear();
            rest = &path[1..];
        }
        "self" => rest = &path[1..],
        "super" => {
            while rest.first().is_some_and(|name| name == "super") {
                base.pop();
                rest = &rest[1..];
            }
        }
        first if children.contains(first) => {}
        _ => return None,
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// Paths in code outside `use`: those that begin with one of the names.
fn inline_paths(code: &str, names: impl Fn(&str) -> bool) -> Vec<Segments> {
    let mut found = Vec::new();
    let bytes = code.as_bytes();
    let mut at = 0;
    while let Some(next) = code[at..].find("::") {
        let mut start = at + next;
        while start > 0 && is_name(bytes[start - 1] as char) {
            start -= 1;
        }
        let begins = start < 2 || &code[start - 2..start] != "::";
        let first = &code[start..at + next];
        let mut end = at + next;
        if begins && names(first) {
            while code[end..].starts_with("::") {
                let rest = &code[end + 2..];
                let length = rest.find(|letter| !is_name(letter)).unwrap_or(rest.len());
                if length == 0 {
                    break;
                }
                end += 2 + length;
            }
            found.push(code[start..end].split("::").map(str::to_owned).collect());
        }
        at = end.max(at + next + 2);
    }
    found
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            // Unit tests may use what lies above.
            if !path.ends_with("tests") {
                rust_files(&path, found);
            }
        } else if path.extension().is_some_and(|kind| kind == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

fn module_of(path: &Path, source: &Path) -> Segments {
    let path = path.strip_prefix(source).unwrap().with_extension("");
    let mut module: Segments = path
        .iter()
        .map(|part| part.to_str().unwrap().to_owned())
        .collect();
    if module.len() > 1
        && module
            .last()
            .is_some_and(|last| last == "mod" || last == "main")
    {
        module.pop();
    }
    module
}

fn read(path: PathBuf, source: &Path) -> File {
    let module = module_of(&path, source);
    let code = strip(&fs::read_to_string(&path).unwrap());
    File {
        path,
        module,
        code,
        reexports: HashMap::new(),
        uses: BTreeSet::new(),
    }
}

/// All files of `src/`, with what each names.
fn house() -> Vec<File> {
    let source = root().join("src");
    let mut paths = Vec::new();
    rust_files(&source, &mut paths);
    paths.retain(|path| !path.ends_with("src/lib.rs"));
    paths.sort();
    let mut files: Vec<File> = paths.into_iter().map(|path| read(path, &source)).collect();
    let modules: BTreeSet<Segments> = files.iter().map(|file| file.module.clone()).collect();
    for file in &mut files {
        let children: BTreeSet<String> = modules
            .iter()
            .filter(|module| {
                module.len() == file.module.len() + 1 && module.starts_with(&file.module)
            })
            .map(|module| module.last().unwrap().clone())
            .collect();
        // In a binary, `crate` is the binary.
        let root: Segments = if file.room() == "bin" {
            file.module[..2.min(file.module.len())].to_vec()
        } else {
            Vec::new()
        };
        let place = |path: &[String]| {
            let inside = !root.is_empty() && path.first().is_some_and(|first| first == "crate");
            let found = absolute(path, &file.module, &children)?;
            Some(if inside {
                root.iter().cloned().chain(found).collect()
            } else {
                found
            })
        };
        let mut names: HashMap<String, Segments> = HashMap::new();
        let mut body = String::new();
        let mut rest = file.code.as_str();
        while let Some(at) = rest.find("use ") {
            let begins = rest[..at]
                .chars()
                .next_back()
                .is_none_or(|letter| !is_name(letter));
            let line = rest[..at]
                .rsplit('\n')
                .next()
                .unwrap_or_default()
                .trim_start();
            let Some(length) = rest[at..]
                .find(';')
                .filter(|_| begins && (line.is_empty() || line.starts_with("pub")))
            else {
                body.push_str(&rest[..at + 4]);
                rest = &rest[at + 4..];
                continue;
            };
            body.push_str(&rest[..at]);
            let mut found = Vec::new();
            use_tree(&rest[at + 4..at + length], &[], &mut found);
            for (name, path) in found {
                if let Some(path) = place(&path) {
                    if line.starts_with("pub") {
                        file.reexports.insert(name, path);
                    } else {
                        names.insert(name, path.clone());
                        file.uses.insert(path);
                    }
                }
            }
            rest = &rest[at + length..];
        }
        body.push_str(rest);
        let known = |name: &str| {
            ["crate", "super", "self", "atproto_relay"].contains(&name)
                || children.contains(name)
                || names.contains_key(name)
        };
        for path in inline_paths(&body, known) {
            let found = match names.get(&path[0]) {
                Some(prefix) => Some(prefix.iter().chain(&path[1..]).cloned().collect()),
                None => place(&path),
            };
            file.uses.extend(found);
        }
    }
    files
}

/// The file that defines what a path names, re-exports followed.
fn definition(
    path: &[String],
    files: &[File],
    places: &HashMap<&[String], usize>,
    depth: usize,
) -> Option<usize> {
    let (length, file) = (1..=path.len())
        .rev()
        .find_map(|length| Some((length, *places.get(&path[..length])?)))?;
    let Some(name) = path.get(length) else {
        // A module by itself: what is taken from it stands elsewhere.
        return None;
    };
    match files[file].reexports.get(name) {
        Some(other) if depth < 8 => {
            let whole: Segments = other.iter().chain(&path[length + 1..]).cloned().collect();
            definition(&whole, files, places, depth + 1)
        }
        _ => Some(file),
    }
}

fn places(files: &[File]) -> HashMap<&[String], usize> {
    files
        .iter()
        .enumerate()
        .map(|(index, file)| (&file.module[..], index))
        .collect()
}

#[test]
fn a_room_uses_only_rooms_below_it() {
    let files = house();
    let rooms = rooms();
    let floor = |room: &str| rooms.iter().position(|known| known == room);
    let mut upward: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for file in &files {
        let here = floor(file.room())
            .unwrap_or_else(|| panic!("{} is in no room of the list", file.path.display()));
        for path in file.uses.iter().chain(file.reexports.values()) {
            if let Some(there) = path.first().and_then(|room| floor(room))
                && there > here
            {
                upward
                    .entry((file.room().to_owned(), path[0].clone()))
                    .or_default()
                    .insert(file.path.display().to_string());
            }
        }
    }
    assert!(
        upward.is_empty(),
        "rooms that use a room above: {upward:#?}"
    );
}

#[test]
fn every_room_of_the_list_exists() {
    let present: BTreeSet<String> = house().iter().map(|file| file.room().to_owned()).collect();
    assert_eq!(present, rooms().into_iter().collect());
}

#[test]
fn no_two_files_need_each_other() {
    let files = house();
    let places = places(&files);
    let needs: Vec<BTreeSet<usize>> = files
        .iter()
        .enumerate()
        .map(|(index, file)| {
            let found = file
                .uses
                .iter()
                .filter_map(|path| definition(path, &files, &places, 0));
            // A module and those inside it are one thing: a child may use what its parent defines.
            found
                .filter(|&other| other != index && !file.module.starts_with(&files[other].module))
                .collect()
        })
        .collect();
    let mut circles = Vec::new();
    for start in 0..files.len() {
        // Whatever leads back to the start, by the shortest way.
        let mut before: HashMap<usize, usize> = HashMap::new();
        let mut queue = std::collections::VecDeque::from([start]);
        'search: while let Some(at) = queue.pop_front() {
            for &next in &needs[at] {
                if next == start {
                    let mut way = vec![at];
                    while let Some(&earlier) = before.get(way.last().unwrap()) {
                        way.push(earlier);
                    }
                    way.reverse();
                    if way.iter().min() == Some(&start) {
                        let names: Vec<String> = way
                            .iter()
                            .map(|&index| files[index].module.join("/"))
                            .collect();
                        circles.push(names.join(" -> "));
                    }
                    break 'search;
                }
                if next != start && !before.contains_key(&next) {
                    before.insert(next, at);
                    queue.push_back(next);
                }
            }
        }
    }
    assert!(
        circles.is_empty(),
        "files that need each other:\n{}",
        circles.join("\n")
    );
}
