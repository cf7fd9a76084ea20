// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A map from addresses to values, whose table is one plain class for all types of values: a
/// std::unordered_map is compiled anew for each of them, in every unit that includes us.
///   PointerMap<Record> records;
///   records[key].bytes = 3;                                     // made where it was not
///   if (const Record* known = records.find(key)) use(*known);   // null where it is not
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

struct PointerNode {
  const void* key = nullptr;
  PointerNode* next = nullptr;  ///< in the same bucket
};

/// Chains of nodes that others make and delete. Any thread, one at a time.
template <class = void>
class PointerTable {
 public:
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] PointerNode* find(const void* key) const {
    if (size_ == 0) return nullptr;
    PointerNode* node = buckets_[bucket(key)];
    while (node != nullptr && node->key != key) node = node->next;
    return node;
  }
  /// For one more node.
  void make_room() {
    if (size_ >= buckets_.size()) grow();
  }
  /// There is room, and `node->key` is not there yet.
  void add(PointerNode* node) {
    PointerNode*& head = buckets_[bucket(node->key)];
    node->next = std::exchange(head, node);
    ++size_;
  }
  /// Takes it out, or is null.
  PointerNode* take(const void* key) {
    if (size_ == 0) return nullptr;
    PointerNode** link = &buckets_[bucket(key)];
    while (*link != nullptr && (*link)->key != key) link = &(*link)->next;
    if (*link == nullptr) return nullptr;
    --size_;
    return std::exchange(*link, (*link)->next);
  }
  /// Every node, in one chain; the table is empty then.
  PointerNode* take_all() {
    PointerNode* all = nullptr;
    for (PointerNode*& head : buckets_)
      while (head != nullptr) {
        PointerNode* const node = std::exchange(head, head->next);
        node->next = std::exchange(all, node);
      }
    size_ = 0;
    return all;
  }
  /// The node after `node`, or the first one; null after the last.
  [[nodiscard]] PointerNode* after(const PointerNode* node) const {
    if (node != nullptr && node->next != nullptr) return node->next;
    for (std::size_t b = node == nullptr ? 0 : bucket(node->key) + 1; b < buckets_.size(); ++b)
      if (buckets_[b] != nullptr) return buckets_[b];
    return nullptr;
  }

 private:
  /// Fibonacci hashing: a power of two of buckets, by the product's highest bits.
  [[nodiscard]] std::size_t bucket(const void* key) const {
    const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(key));
    return static_cast<std::size_t>((address * 0x9E3779B97F4A7C15u) >> shift_);
  }
  void grow() {
    std::vector<PointerNode*> wider(buckets_.empty() ? 16 : 2 * buckets_.size());
    const std::size_t size = size_;
    PointerNode* node = take_all();
    shift_ = buckets_.empty() ? 60 : shift_ - 1;
    buckets_.swap(wider);
    while (node != nullptr) {
      PointerNode*& head = buckets_[bucket(node->key)];
      PointerNode* const next = node->next;
      node->next = std::exchange(head, node);
      node = next;
    }
    size_ = size;
  }

  std::vector<PointerNode*> buckets_;
  std::size_t size_ = 0;
  int shift_ = 64;
};

}  // namespace detail

/// Values stay where they are until they are erased.
template <class T>
class PointerMap {
  struct Node : detail::PointerNode {
    explicit Node(const void* of, T holds) : PointerNode{of}, value(std::move(holds)) {}
    T value;
  };

 public:
  PointerMap() = default;
  ~PointerMap() { clear(); }
  PointerMap(const PointerMap&) = delete;
  PointerMap& operator=(const PointerMap&) = delete;

  [[nodiscard]] std::size_t size() const { return table_.size(); }
  [[nodiscard]] bool empty() const { return table_.size() == 0; }
  [[nodiscard]] T* find(const void* key) { return value_of(table_.find(key)); }
  [[nodiscard]] const T* find(const void* key) const { return value_of(table_.find(key)); }

  T& operator[](const void* key) {
    T* const known = find(key);
    return known != nullptr ? *known : add(key, T{});
  }
  /// In place of what was there, if anything was.
  T& put(const void* key, T value) {
    T* const known = find(key);
    return known != nullptr ? *known = std::move(value) : add(key, std::move(value));
  }
  /// Whether it was not there; then it is.
  bool insert(const void* key) {
    if (find(key) != nullptr) return false;
    add(key, T{});
    return true;
  }
  void erase(const void* key) { delete static_cast<Node*>(table_.take(key)); }
  template <class Predicate>
  void erase_if(const Predicate& goes) {
    for (detail::PointerNode* node = table_.after(nullptr); node != nullptr;) {
      Node* const one = static_cast<Node*>(node);
      node = table_.after(node);
      if (goes(one->value)) erase(one->key);
    }
  }
  /// Every value, in an order that stays while nothing is added or erased.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (detail::PointerNode* node = table_.after(nullptr); node; node = table_.after(node))
      visit(static_cast<const Node*>(node)->value);
  }
  void clear() {
    for (detail::PointerNode* node = table_.take_all(); node != nullptr;)
      delete static_cast<Node*>(std::exchange(node, node->next));
  }

 private:
  T& add(const void* key, T value) {
    table_.make_room();
    Node* const made = new Node(key, std::move(value));
    table_.add(made);
    return made->value;
  }
  static T* value_of(detail::PointerNode* node) {
    return node == nullptr ? nullptr : &static_cast<Node*>(node)->value;
  }

  detail::PointerTable<> table_;
};

/// Addresses alone: `if (seen.insert(key)) ...`
struct NoValue {};
using PointerSet = PointerMap<NoValue>;

}  // namespace fourfold::inline v0
