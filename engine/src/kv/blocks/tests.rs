use proptest::prelude::*;

use super::*;

fn tokens(first: u32, blocks: usize) -> Vec<u32> {
    (0..(blocks * BLOCK_SIZE) as u32).map(|at| first + at).collect()
}

/// Allocates and registers the full blocks of `tokens`, reusing what is cached.
fn fill(pool: &mut BlockPool, scope: u64, tokens: &[u32]) -> Vec<BlockId> {
    let mut table = pool.acquire_prefix(scope, tokens);
    for chunk in tokens.as_chunks().0.iter().skip(table.len()) {
        let block = pool.allocate().expect("a block");
        let parent = table.last().map_or(Parent::Root(scope), |&id| Parent::Block(id));
        table.push(pool.register(parent, *chunk, block));
    }
    pool.check();
    table
}

#[test]
fn gives_each_block_once_then_none() {
    let mut pool = BlockPool::new(3);
    let given: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
    assert_eq!(given, [0, 1, 2]);
    assert_eq!((pool.num_used(), pool.usage()), (3, 1.0));
    pool.release(&given);
    pool.check();
    assert_eq!((pool.num_available(), pool.usage()), (3, 0.0));
}

#[test]
fn a_released_prefix_is_found_again_within_its_scope() {
    let mut pool = BlockPool::new(8);
    let prompt = tokens(100, 3);
    let table = fill(&mut pool, 0, &prompt);
    pool.release(&table);
    assert_eq!(pool.num_available(), 8);
    assert_eq!(pool.acquire_prefix(0, &prompt[..40]), table[..2]);
    assert!(pool.acquire_prefix(1, &prompt).is_empty());
    assert_eq!(pool.num_used(), 2);
    pool.check();
}

#[test]
fn the_same_tokens_after_another_prefix_are_another_block() {
    let mut pool = BlockPool::new(8);
    let (first, second) = ([tokens(0, 1), tokens(50, 1)].concat(), [tokens(9, 1), tokens(50, 1)].concat());
    fill(&mut pool, 0, &first);
    assert!(pool.acquire_prefix(0, &second).is_empty());
    assert!(pool.acquire_prefix(0, &tokens(50, 1)).is_empty());
}

#[test]
fn two_that_compute_the_same_end_with_one_block() {
    let mut pool = BlockPool::new(4);
    let content = *tokens(7, 1).first_chunk().expect("16 tokens");
    let (a, b) = (pool.allocate().expect("a block"), pool.allocate().expect("a block"));
    assert_eq!(pool.register(Parent::Root(0), content, a), a);
    assert_eq!(pool.register(Parent::Root(0), content, b), a);
    assert_eq!((pool.num_used(), pool.refs()[a as usize]), (1, 2));
    pool.check();
}

#[test]
fn eviction_takes_the_least_recently_used_and_children_before_parents() {
    let mut pool = BlockPool::new(4);
    let (old, new) = (tokens(0, 2), tokens(1000, 2));
    for prompt in [&old, &new, &old] {
        let table = fill(&mut pool, 0, prompt);
        pool.release(&table);
    }
    let _taken = pool.allocate().expect("a block");
    pool.check();
    let found = pool.acquire_prefix(0, &new);
    assert_eq!(found.len(), 1, "the second block of the prefix that was used longer ago went first");
    pool.release(&found);
    assert_eq!(pool.acquire_prefix(0, &old).len(), 2);
}

#[test]
fn a_cleared_cache_finds_nothing_and_takes_no_child_of_a_forgotten_block() {
    let mut pool = BlockPool::new(6);
    let table = fill(&mut pool, 0, &tokens(0, 1));
    pool.clear_cache();
    assert!(pool.acquire_prefix(0, &tokens(0, 1)).is_empty());
    let child = pool.allocate().expect("a block");
    assert_eq!(pool.register(Parent::Block(table[0]), [5; BLOCK_SIZE], child), child);
    assert!(!pool.is_cached(child));
    pool.release(&[table[0], child]);
    pool.check();
    assert_eq!(pool.num_available(), 6);
}

proptest! {
    /// Random holders of random prefixes over few blocks: the books stay whole, and a hit has the right tokens.
    #[test]
    fn books_stay_whole(
        num_blocks in 1_usize..12,
        steps in prop::collection::vec((0_u64..2, prop::collection::vec(0_u32..3, 1..5), any::<prop::sample::Index>(), 0_u32..20), 1..60),
    ) {
        let mut pool = BlockPool::new(num_blocks);
        let mut written: HashMap<BlockId, Vec<u32>> = HashMap::new();
        let mut held: Vec<Vec<BlockId>> = Vec::new();
        for (scope, kinds, which, dice) in steps {
            if dice == 0 {
                pool.clear_cache();
            }
            if dice < 10 && !held.is_empty() {
                pool.release(&held.swap_remove(which.index(held.len())));
            } else {
                let prompt: Vec<u32> = kinds.iter().flat_map(|&kind| [kind; BLOCK_SIZE]).collect();
                let mut table = pool.acquire_prefix(scope, &prompt);
                for (at, id) in table.iter().enumerate() {
                    prop_assert_eq!(&written[id], &prompt[..(at + 1) * BLOCK_SIZE]);
                }
                for at in table.len()..kinds.len() {
                    let Some(block) = pool.allocate() else { break };
                    written.insert(block, prompt[..(at + 1) * BLOCK_SIZE].to_vec());
                    let parent = table.last().map_or(Parent::Root(scope), |&id| Parent::Block(id));
                    table.push(pool.register(parent, [kinds[at]; BLOCK_SIZE], block));
                }
                held.push(table);
            }
            pool.check();
            prop_assert_eq!(pool.refs().iter().sum::<u32>() as usize, held.iter().map(Vec::len).sum::<usize>());
        }
        for table in held {
            pool.release(&table);
        }
        pool.check();
        prop_assert_eq!(pool.num_available(), num_blocks);
    }
}
