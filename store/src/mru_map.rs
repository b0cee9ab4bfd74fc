//! An ordered map that finds at once what it has found last: a request looks up its connection and
//! its domain about ten times.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cell::Cell;
use core::fmt;
use core::ops::Index;

#[derive(Clone)]
pub(crate) struct MruMap<K: Copy, V> {
    /// Where the value of each key is.
    places: BTreeMap<K, usize>,
    values: Vec<Option<Box<V>>>,
    free: Vec<usize>,
    last: Cell<Option<(K, usize)>>,
}

impl<K: Ord + Copy, V> MruMap<K, V> {
    pub(crate) fn new() -> MruMap<K, V> {
        let places = BTreeMap::new();
        MruMap { places, values: Vec::new(), free: Vec::new(), last: Cell::new(None) }
    }

    fn place(&self, key: &K) -> Option<usize> {
        if let Some((last, place)) = self.last.get()
            && last == *key
        {
            return Some(place);
        }
        let place = *self.places.get(key)?;
        self.last.set(Some((*key, place)));
        Some(place)
    }

    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.place(key).is_some()
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.values[self.place(key)?].as_deref()
    }

    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let place = self.place(key)?;
        self.values[place].as_deref_mut()
    }

    /// Puts a value in the place of what was there for this key.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let value = Some(Box::new(value));
        if let Some(place) = self.place(&key) {
            return core::mem::replace(&mut self.values[place], value).map(|old| *old);
        }
        let place = self.free.pop().unwrap_or(self.values.len());
        match self.values.get_mut(place) {
            Some(free) => *free = value,
            None => self.values.push(value),
        }
        self.places.insert(key, place);
        None
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        self.last.set(None);
        let place = self.places.remove(key)?;
        self.free.push(place);
        self.values[place].take().map(|value| *value)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        *self = MruMap::new();
    }

    /// In the order of keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.places.keys()
    }

    /// In the order of keys.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.places.iter().filter_map(|(key, place)| Some((key, self.values[*place].as_deref()?)))
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// In any order, for changes that are the same in each.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.values.iter_mut().filter_map(Option::as_deref_mut)
    }
}

impl<K: Ord + Copy, V> Default for MruMap<K, V> {
    fn default() -> Self {
        MruMap::new()
    }
}

impl<K: Ord + Copy, V> Index<&K> for MruMap<K, V> {
    type Output = V;

    fn index(&self, key: &K) -> &V {
        self.get(key).expect("it is there")
    }
}

impl<K: Ord + Copy + fmt::Debug, V: fmt::Debug> fmt::Debug for MruMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if what was found last is found when it is gone, or in the place of another.
    #[test]
    fn behaves_like_a_map() {
        let (mut recent, mut model) = (MruMap::new(), BTreeMap::new());
        let mut random = 1_u32;
        for step in 0..10_000_u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (key, what) = (random >> 16 & 7, random >> 24 & 3);
            match what {
                0 => assert_eq!(recent.insert(key, step), model.insert(key, step)),
                1 => assert_eq!(recent.remove(&key), model.remove(&key)),
                2 => assert_eq!(recent.get_mut(&key), model.get_mut(&key)),
                _ => assert_eq!(recent.get(&key), model.get(&key)),
            }
            assert!(recent.iter().eq(model.iter()) && recent.values.len() <= 8);
        }
    }
}
