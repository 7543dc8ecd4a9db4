// A queue whose links are in its elements, so that to queue one needs no memory and cannot fail.
#pragma once

namespace sdpa {

/// First in, first out. An element has one place for the link, `Next`, for each queue that it may
/// be in at the same time.
template <typename T, T* T::*Next>
class Queue {
 public:
  Queue() = default;
  Queue(const Queue&) = delete;

  bool empty() const { return first_ == nullptr; }
  T* first() const { return first_; }

  void push(T* element) {
    element->*Next = nullptr;
    *end_ = element;
    end_ = &(element->*Next);
  }

  /// Takes out an element, wherever it stands; false if it is not there.
  bool remove(T* element) {
    T** link = &first_;
    while (*link != nullptr && *link != element) link = &((*link)->*Next);
    if (*link == nullptr) return false;
    *link = element->*Next;
    if (end_ == &(element->*Next)) end_ = link;
    return true;
  }

  /// Takes out all elements: the first, with the others behind it by their links.
  T* take_all() {
    T* const first = first_;
    first_ = nullptr;
    end_ = &first_;
    return first;
  }

 private:
  T* first_ = nullptr;
  T** end_ = &first_;  // where the link to the next element to come is
};

}  // namespace sdpa
