//! What the imports promise: no circle between modules, and in `node` no arrow that runs up.
//!
//! A file and the folder of its name are one module here: what is in the folder is part of what is
//! in the file.

mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{ItemMod, ItemUse, UseTree};

use sources::collect;

/// The rooms of `node`. Each uses only those before it.
const ROOMS: [&str; 8] =
    ["platform", "transport", "cells", "peers", "clients", "tasks", "admin", "start"];

type Module = Vec<String>;

/// The modules of a crate, each with those that it names.
fn modules(dir: &Path) -> BTreeMap<Module, BTreeSet<Module>> {
    let mut files = Vec::new();
    collect(dir, &mut files);
    let mut sources = BTreeMap::new();
    for file in files {
        let relative = file.strip_prefix(dir).unwrap().with_extension("");
        let parts = relative.components().map(|part| part.as_os_str().to_string_lossy());
        let mut module: Module = parts.map(Into::into).collect();
        if ["mod", "lib", "main"].contains(&module.last().unwrap().as_str()) {
            module.pop();
        }
        let source = syn::parse_file(&fs::read_to_string(&file).unwrap()).unwrap();
        sources.insert(module, source);
    }
    let known: BTreeSet<Module> = sources.keys().cloned().collect();
    let named = |(module, source): (&Module, &syn::File)| {
        let mut names = Names { module: module.clone(), found: Vec::new() };
        names.visit_file(source);
        let found = names.found.into_iter().filter_map(|path| {
            (1..=path.len()).rev().map(|n| path[..n].to_vec()).find(|path| known.contains(path))
        });
        (module.clone(), found.filter(|other| other != module).collect())
    };
    sources.iter().map(named).collect()
}

/// Collects the paths, from the crate's root, that a file names.
struct Names {
    module: Module,
    found: Vec<Module>,
}

impl Names {
    fn add(&mut self, path: Vec<String>) {
        let absolute = match path.first().map(String::as_str) {
            Some("crate") => path[1..].to_vec(),
            Some("self") => [&self.module[..], &path[1..]].concat(),
            Some("super") => {
                let up = path.iter().take_while(|part| *part == "super").count();
                let base = &self.module[..self.module.len().saturating_sub(up)];
                [base, &path[up..]].concat()
            }
            _ => return,
        };
        self.found.push(absolute);
    }

    fn add_tree(&mut self, tree: &UseTree, before: &[String]) {
        match tree {
            UseTree::Path(path) => {
                let before = [before, &[path.ident.to_string()]].concat();
                self.add_tree(&path.tree, &before);
            }
            UseTree::Name(name) if name.ident == "self" => self.add(before.to_vec()),
            UseTree::Name(name) => self.add([before, &[name.ident.to_string()]].concat()),
            UseTree::Rename(name) => self.add([before, &[name.ident.to_string()]].concat()),
            UseTree::Glob(_) => self.add(before.to_vec()),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_tree(tree, before));
            }
        }
    }
}

impl<'a> Visit<'a> for Names {
    fn visit_item_use(&mut self, item: &'a ItemUse) {
        self.add_tree(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        self.add(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    /// Tests look wherever they like.
    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if item.ident != "tests" {
            visit::visit_item_mod(self, item);
        }
    }
}

/// Modules of which each can be reached from each other one.
fn circles(modules: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<Vec<String>> {
    // What is in a folder is part of the file of that name, unless that is a mod.rs, which holds a
    // room together.
    let whole = |module: &Module| {
        let owner = (1..module.len()).map(|n| module[..n].to_vec());
        let mut owner =
            owner.filter(|owner| modules.contains_key(owner) && !is_room(modules, owner));
        owner.next().unwrap_or_else(|| module.clone())
    };
    let mut arrows: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for (from, all) in modules {
        let from = whole(from);
        let to = all.iter().map(whole).filter(|to| *to != from);
        arrows.entry(from.clone()).or_default().extend(to);
    }
    let reaches = |from: &Module| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(module) = next.pop() {
            for to in arrows.get(&module).into_iter().flatten() {
                if seen.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&Module, _> = arrows.keys().map(|from| (from, reaches(from))).collect();
    let mut found = BTreeSet::new();
    for (from, all) in &reached {
        if all.contains(*from) {
            let both =
                all.iter().filter(|to| reached.get(to).is_some_and(|all| all.contains(*from)));
            found.insert(both.map(|module| module.join("/")).collect::<Vec<_>>());
        }
    }
    found.into_iter().collect()
}

/// A folder whose mod.rs only names what is in it and says it again outside.
fn is_room(modules: &BTreeMap<Module, BTreeSet<Module>>, module: &Module) -> bool {
    let below = |other: &Module| other.len() > module.len() && other.starts_with(module);
    let names = |other: &Module| modules[other].contains(module);
    !modules.keys().any(|other| below(other) && names(other))
}

fn crates() -> impl Iterator<Item = (String, PathBuf)> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_dir(all).unwrap().map(|entry| {
        let entry = entry.unwrap();
        (entry.file_name().to_string_lossy().into_owned(), entry.path().join("src"))
    })
}

#[test]
fn no_module_imports_itself_through_others() {
    let mut checked = 0;
    for (name, dir) in crates() {
        let modules = modules(&dir);
        checked += modules.len();
        assert_eq!(circles(&modules), Vec::<Vec<String>>::new(), "in crate {name}");
    }
    assert!(checked > 100, "{checked} modules");
}

#[test]
fn rooms_of_a_node_use_only_those_before_them() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/src");
    let place = |module: &Module| {
        let room = module.first()?;
        let place = ROOMS.iter().position(|other| other == room);
        Some(
            place.unwrap_or_else(|| panic!("{room} is no room: name it in the list, in its place")),
        )
    };
    let mut arrows = 0;
    for (module, named) in modules(&dir) {
        for other in named {
            if let (Some(from), Some(to)) = (place(&module), place(&other)) {
                let (module, other) = (module.join("/"), other.join("/"));
                assert!(to <= from, "{module} uses {other}, which is in a later room");
                arrows += 1;
            }
        }
    }
    assert!(arrows > 100, "{arrows} arrows");
}

#[test]
fn circles_are_found() {
    let module = |path: &str| path.split('/').map(str::to_owned).collect::<Module>();
    let crate_of = |arrows: &[(&str, &[&str])]| {
        let one =
            |(from, to): &(&str, &[&str])| (module(from), to.iter().map(|to| module(to)).collect());
        arrows.iter().map(one).collect::<BTreeMap<Module, BTreeSet<Module>>>()
    };
    let none = crate_of(&[("a", &["b"]), ("b", &["c"]), ("c", &[])]);
    assert!(circles(&none).is_empty());
    let one = crate_of(&[("a", &["b"]), ("b", &["c"]), ("c", &["a"]), ("d", &["a"])]);
    assert_eq!(circles(&one), [["a", "b", "c"]]);
    // A file and its folder are one.
    let folder = crate_of(&[("a", &["a/part", "b"]), ("a/part", &["a"]), ("b", &[])]);
    assert!(circles(&folder).is_empty());
    let through = crate_of(&[("a", &["a/part"]), ("a/part", &["a", "b"]), ("b", &["a"])]);
    assert_eq!(circles(&through), [["a", "b"]]);
    // A room is not one: its files are modules of their own.
    let room = crate_of(&[("a", &["a/x", "a/y"]), ("a/x", &["a/y"]), ("a/y", &["a/x"])]);
    assert_eq!(circles(&room), [["a/x", "a/y"]]);
}
